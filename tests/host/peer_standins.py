"""Small stand-ins of our own that speak other packs' protocols, and a probe that sees one attention layer's output.

`capture_first_layer` samples one step with the host's sampler and returns what the first cross-attention gives (after
its output projection, which is linear): up to there all variants of a model see the same input, so contributions of
packs that add can be compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SEED, CFG = 7, 4.0


def _host_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, heads)


class AddSlot:
    """The slot object IPAdapter_plus, InstantID and PuLID_ComfyUI share: text attention plus every added callback."""

    def __init__(self, callback: Callable[..., Tensor], **options: Any) -> None:
        self.callbacks = [(callback, options)]

    def add(self, callback: Callable[..., Tensor], **options: Any) -> None:
        self.callbacks.append((callback, options))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        out = _host_attention(q, k, v, extra_options["n_heads"])
        for callback, options in self.callbacks:
            out = out + callback(out, q, k, v, extra_options, **options)
        return out


def added_branch(_out: Tensor, q: Tensor, _k: Tensor, _v: Tensor, _extra: dict[str, Any], *, weight: float) -> Tensor:
    """An additive contribution that depends on the query alone."""
    return weight * torch.tanh(q.flip(-1))


def add_branch(model: Any, keys: Sequence[tuple[Any, ...]], weight: float = 0.5) -> Any:
    """As those packs patch: a new object in an empty slot, `.add` on whatever is there."""
    patched = model.clone()
    options = patched.model_options["transformer_options"].copy()
    replaced = options["patches_replace"] = options.get("patches_replace", {}).copy()
    slots = replaced["attn2"] = replaced.get("attn2", {}).copy()
    for key in keys:
        if key in slots:
            slots[key].add(added_branch, weight=weight)
        else:
            slots[key] = AddSlot(added_branch, weight=weight)
    patched.model_options["transformer_options"] = options
    return patched


def couple(model: Any, contexts: Sequence[Tensor]) -> Any:
    """Attention couple: every positive row is repeated once per region with that region's text, and blended after.

    The regions are equal horizontal bands; the first has the prompt's own text. contexts: `[1, T, D]` of the others.
    """
    patched, num = model.clone(), len(contexts) + 1

    def expand(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        rows = extra["cond_or_uncond"]
        queries, keys = [], []
        for kind, q_part, k_part in zip(rows, q.chunk(len(rows)), k.chunk(len(rows))):
            repeat = num if kind == 0 else 1
            queries.append(q_part.repeat(repeat, 1, 1))
            others = [c.to(k).expand(len(k_part), -1, -1) for c in contexts] if kind == 0 else []
            keys.append(torch.cat([k_part, *others]))
        return torch.cat(queries), torch.cat(keys), torch.cat(keys)

    def blend(out: Tensor, extra: dict[str, Any]) -> Tensor:
        rows, parts, start = extra["cond_or_uncond"], [], 0
        batch = out.shape[0] // sum(num if kind == 0 else 1 for kind in rows)
        band = torch.arange(out.shape[1], device=out.device) * num // out.shape[1]
        for kind in rows:
            if kind != 0:
                parts.append(out[start : start + batch])
                start += batch
                continue
            regions = out[start : start + num * batch].unflatten(0, (num, batch))
            parts.append(sum(regions[i] * (band == i)[None, :, None] for i in range(num)))
            start += num * batch
        return torch.cat(parts)

    patched.set_model_attn2_patch(expand)
    patched.set_model_attn2_output_patch(blend)
    return patched


def override_attention(model: Any, seen: list[str]) -> Any:
    """As KJNodes chooses a kernel: an override that notes each call and runs PyTorch's attention."""
    patched = model.clone()

    def override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        seen.append(func.__name__)
        return func(*args, **kwargs)

    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    return patched


def capture_first_layer(model: Any, key: tuple[Any, ...], positive: Any, negative: Any, size: int = 32) -> Tensor:
    """Output `[rows, tokens, C]` of one cross-attention layer in the first sampling step (negative row last)."""
    import nodes  # the host's: callers hold the `comfyui` fixture

    seen: list[Tensor] = []
    probe = model.clone()

    def note(out: Tensor, extra: dict[str, Any]) -> Tensor:
        if (*extra["block"], extra["block_index"]) == tuple(key):
            order = sorted(range(len(extra["cond_or_uncond"])), key=lambda i: extra["cond_or_uncond"][i])
            seen.append(torch.cat([out.chunk(len(order))[i] for i in order]).clone())
        return out

    probe.set_model_attn2_output_patch(note)
    latent = {"samples": torch.zeros(1, 4, size, size)}
    nodes.common_ksampler(probe, SEED, 1, CFG, "euler", "normal", positive, negative, latent)
    assert seen, f"the layer {key} never ran"
    return seen[0]


def sample(model: Any, positive: Any, negative: Any, *, steps: int = 2, size: int = 32, batch: int = 1) -> Tensor:
    """Latents after a short run of the host's sampler."""
    import nodes

    latent = {"samples": torch.zeros(batch, 4, size, size)}
    return nodes.common_ksampler(model, SEED, steps, CFG, "euler", "normal", positive, negative, latent)[0]["samples"]
