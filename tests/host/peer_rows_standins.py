"""Rows of the matrix with small stand-ins of our own: what packs do, where no pack is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peer_standins
import torch
from peer_matrix import STAND_IN, Install, Kit, Row
from peer_rows_host import NO_GUIDANCE, blurred, perturbed
from peer_rows_packs import REGION, in_bands, tiles_by_hand
from torch import Tensor, nn


def on_model(change: Callable[[Kit, Any], Any]) -> Install:
    """A change of the MODEL as an install."""
    return lambda kit, graph: graph.having(model=change(kit, graph.model))


def _added(kit: Kit, model: Any) -> Any:
    return peer_standins.add_branch(model, [site.key for site in kit.lab.sites])


def _coupled(num: int) -> Install:
    texts = lambda kit: [kit.text(REGION + i)[0][0] for i in range(1, num)]  # noqa: E731
    return on_model(lambda kit, model: peer_standins.couple(model, texts(kit)))


def sharper_attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    """A layer of somebody's own."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(1.5 * q, k, v, extra["n_heads"])


def _replaced(parts: int) -> Callable[[Kit, Any], Any]:
    """Every cross-attention layer by somebody's own, who asks nobody; named by two parts or three."""

    def change(kit: Kit, model: Any) -> Any:
        clone = model.clone()
        for site in kit.lab.sites:
            clone.set_model_attn2_replace(sharper_attention, *site.key[:parts])
        return clone

    return change


def _writes_into_queries(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    from comfy.ldm.modules.attention import optimized_attention

    q[:] = q.mean(1, keepdim=True)
    return optimized_attention(q, k, v, extra["n_heads"])


def _own_pass(kit: Kit, model: Any) -> Any:
    """Guidance by a pass in which the middle block has other self-attention, set in a copy of the options of a step."""
    import comfy.model_patcher
    import comfy.samplers

    def guide(args: dict[str, Any]) -> Tensor:
        options = comfy.model_patcher.set_model_options_patch_replace(
            args["model_options"].copy(), _writes_into_queries, "attn1", "middle", 0
        )
        (changed,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        return args["denoised"] + 2.0 * (args["cond_denoised"] - changed)

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(guide)
    return clone


def _tiled(kit: Kit, model: Any) -> Any:
    """The two halves of the latent as one batch, all prompts of a tile after those of the one before."""

    def run(apply: Any, args: dict[str, Any]) -> Tensor:
        x, t, given = args["input"], args["timestep"], args["c"]
        tiles = torch.cat(x.chunk(2, dim=2))
        context = given["c_crossattn"].repeat(2, 1, 1)
        out = apply(tiles, t.repeat(2), **{**given, "c_crossattn": context})
        return torch.cat(out.chunk(2), dim=2)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(run)
    return clone


def _drops_masks(kit: Kit, model: Any) -> Any:
    def kernel(_func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **given: Any) -> Tensor:
        return _func(q, k, v, heads, **{name: value for name, value in given.items() if name != "mask"})

    clone = model.clone()
    options = clone.model_options["transformer_options"] = clone.model_options["transformer_options"].copy()
    options["optimized_attention_override"] = kernel
    return clone


def _twice_the_keys(kit: Kit, model: Any) -> Any:
    """Self-attention also looks at the first picture of the batch, as reference and style packs have it."""
    clone = model.clone()

    def look(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        each = len(n) // len(extra["cond_or_uncond"])
        firsts = torch.cat([part[:1].expand(each, -1, -1) for part in context.split(each)])
        return n, torch.cat([context, firsts], 1), torch.cat([value, firsts], 1)

    clone.set_model_attn1_patch(look)
    return clone


class MixedFrames(nn.Module):
    """Mixes the frames of a clip, and can do nothing with another number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        frames = x.unflatten(0, (-1, 4))
        return (frames + 0.3 * frames.roll(1, 1)).flatten(0, 1)


def _motion(kit: Kit, model: Any) -> Any:
    from comfy.model_patcher import PatcherInjection

    clone, layer = model.clone(), MixedFrames()

    def inject(patcher: Any) -> None:
        patcher.model.diffusion_model.input_blocks[1].append(layer)

    def eject(patcher: Any) -> None:
        del patcher.model.diffusion_model.input_blocks[1][-1]

    clone.set_injections("mixed frames", [PatcherInjection(inject=inject, eject=eject)])
    clone.set_model_forward_timestep_embed_patch((MixedFrames, lambda layer, x, *_, **__: layer(x)))
    return clone


def standin_rows() -> list[Row]:
    """Every kind."""
    rows = {
        "adds through .add": Row("", on_model(_added), "adds"),
        "repeats rows for 2 regions": Row("", _coupled(2), "layers", layers=in_bands(2), forms=NO_GUIDANCE),
        "repeats rows for 4 regions": Row("", _coupled(4), "layers", layers=in_bands(4), forms=NO_GUIDANCE),
        "replaces layers of two parts": Row("", on_model(_replaced(2)), "adds", forms=NO_GUIDANCE),
        "replaces layers of three parts": Row("", on_model(_replaced(3)), "adds", forms=NO_GUIDANCE),
        "a pass of its own that writes into queries": Row(
            "", on_model(_own_pass), "value", value=perturbed(2.0, blurred), thorough=True
        ),
        "tiles in one batch": Row("", on_model(_tiled), "value", value=tiles_by_hand, forms=NO_GUIDANCE),
        "a kernel that drops masks": Row("", on_model(_drops_masks), "same"),
        "twice the keys": Row("", on_model(_twice_the_keys), "orders", base={"frames": 2}, forms=NO_GUIDANCE),
        "a motion module": Row("", on_model(_motion), "orders", base={"frames": 4}, first=("attn1", "attn2")),
    }
    return [replace(row, pack=STAND_IN, name=name) for name, row in rows.items()]
