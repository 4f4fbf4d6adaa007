"""Promise 3: the same adapter gives the same UNet output in ComfyUI and in diffusers (fp32, 1e-4).

One small model per layout: the host's random checkpoint, loaded by the host, and the same weights in diffusers' UNet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from attention.adapter import AdapterSettings
from attention.fusion import FaceKeys, decoupled_attention, fused_attention, length_term
from attention.grid import grid_at_level
from attention.routing import route
from training.unet import FusedUNet, Reference, TextContext

pytestmark = pytest.mark.host
LAYOUTS = ["sd15_small", "sdxl_tiny"]
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Twins:
    """The host's ModelPatcher and a diffusers `FusedUNet` with the same weights."""

    patcher: Any
    fused: FusedUNet
    sdxl: bool

    @property
    def ldm(self) -> torch.nn.Module:
        return self.patcher.model.diffusion_model

    def context(self, rows: int, seed: int) -> TextContext:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(rows, 77, 2048 if self.sdxl else 768, generator=generator)
        if not self.sdxl:
            return TextContext(tokens)
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(rows, -1)
        return TextContext(tokens, torch.randn(rows, 1280, generator=generator), ids)


def twins(small_models, layout: str) -> Twins:
    from diffusers import UNet2DConditionModel

    patcher = small_models.load_unet(layout)
    config = patcher.model.model_config.unet_config
    unet = UNet2DConditionModel(**diffusers_config(config)).eval()
    unet.load_state_dict(diffusers_weights(patcher, config), strict=True)
    settings = AdapterSettings(base="custom", reference_size=64)
    return Twins(patcher, FusedUNet(unet, settings).eval(), config.get("adm_in_channels") is not None)


def diffusers_config(config: dict) -> dict:
    """diffusers' description of the UNet that the host detected."""
    channels = [config["model_channels"] * m for m in config["channel_mult"]]
    layers = config["num_res_blocks"][0]
    depth = config["transformer_depth"][::layers]
    crosses = [bool(d) for d in depth]
    sdxl = config.get("adm_in_channels") is not None
    heads = [c // config["num_head_channels"] if config["num_heads"] == -1 else config["num_heads"] for c in channels]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.get("adm_in_channels"),
        "use_linear_projection": True,
    }
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crosses],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crosses)],
        "transformer_layers_per_block": [max(1, d) for d in depth],
        "attention_head_dim": heads,
        "cross_attention_dim": config["context_dim"],
        **(added if sdxl else {}),
    }


def diffusers_weights(patcher: Any, config: dict) -> dict[str, torch.Tensor]:
    """The host's weights under diffusers' names, by the host's own map."""
    from comfy.utils import unet_to_diffusers

    weights = patcher.model.diffusion_model.state_dict()
    names = unet_to_diffusers(config).items()
    # The host calls SDXL's label embedding by two diffusers names; diffusers' SDXL has the second only.
    return {new: weights[old].float() for new, old in names if old in weights and not new.startswith("class_embedding")}


def host_forward(
    pair: Twins, x: torch.Tensor, t: torch.Tensor, context: TextContext, options: dict | None = None
) -> torch.Tensor:
    y = None
    if pair.sdxl:
        embed = pair.fused.unet.add_time_proj(context.time_ids.flatten()).reshape(len(x), -1)
        y = torch.cat([context.pooled, embed], 1)
    with torch.no_grad():
        return pair.ldm(x, t, context=context.tokens, y=y, transformer_options=options or {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_two_unets_are_the_same_without_faces(layout, comfyui, small_models):
    pair = twins(small_models, layout)
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    t, context = torch.tensor([37.0, 801.0]), pair.context(2, seed=1)
    with torch.no_grad():
        ours = pair.fused(x, t, context)
    theirs = host_forward(pair, x, t, context)
    assert torch.allclose(ours, theirs, atol=TOLERANCE), float((ours - theirs).abs().max())
    assert float(theirs.std()) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sites_have_the_same_names_levels_and_widths(layout, comfyui, small_models):
    from attention.sites import discover_sites

    pair = twins(small_models, layout)
    assert discover_sites(pair.ldm) == pair.fused.sites


def host_recording(pair: Twins, reference: Reference) -> dict[str, torch.Tensor]:
    """Hidden states after norm2 in the host's own reference pass, by LDM path."""
    found, keys = {}, {site.key: site.path for site in pair.fused.sites}

    def record(n, context, value, options):
        found[keys[(*options["block"], options["block_index"])]] = n
        return n, context, value

    options = {"patches": {"attn2_patch": [record]}}
    with torch.no_grad():
        zeros = torch.zeros(len(reference.latents))
        host_forward(pair, reference.latents, zeros, reference.context.rows(len(zeros)), options)
    return found


def host_with_faces(
    pair: Twins,
    x: torch.Tensor,
    t: torch.Tensor,
    context: TextContext,
    references: list[Reference],
    masks: torch.Tensor | None,
) -> torch.Tensor:
    """The host's UNet with the shared attention functions in its attn2 replacement slots."""
    recordings = [host_recording(pair, reference) for reference in references]
    counts = [sum(r.identity == reference.identity for r in references) for reference in references]
    projections = pair.fused.export_projections()
    settings = pair.fused.settings
    replaced = {}
    for site in pair.fused.sites:
        weights = projections[site.path]
        side = settings.reference_size // 8
        trained = math.prod(grid_at_level((side, side), site.level))
        faces = []
        for reference, hidden, count in zip(references, recordings, counts):
            h = hidden[site.path]
            term = length_term(settings.length, num_tokens=h.shape[1], num_references=count, num_trained=trained)
            key, value = h @ weights.key.T, h @ weights.value.T
            faces.append(FaceKeys(key, value, reference.identity, term + math.log(reference.weight)))
        grid = grid_at_level((x.shape[2], x.shape[3]), site.level)
        regions = None if masks is None else route(masks, grid)
        replaced[site.key] = slot(faces, site.heads, regions, settings.combine)
    with torch.no_grad():
        return host_forward(pair, x, t, context, {"patches_replace": {"attn2": replaced}})


def slot(faces: list[FaceKeys], heads: int, regions: Any, combine: str) -> Any:
    attention = fused_attention if combine == "fused" else decoupled_attention

    def attend(q, k, v, options):
        return attention(q, k, v, faces, heads=heads, regions=regions)

    return attend


CASES = {
    "single": ([(5, 0, 1.0)], False, "fused"),
    "several references": ([(5, 0, 1.0), (6, 0, 0.5), (7, 0, 1.5)], False, "fused"),
    "routed": ([(5, 0, 1.0), (6, 1, 1.0)], True, "fused"),
    "routed, several references": ([(5, 0, 1.0), (6, 1, 0.7), (7, 1, 1.3)], True, "fused"),
    "decoupled": ([(5, 0, 1.0)], False, "decoupled"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_adapter_gives_the_same_output(case, layout, comfyui, small_models):
    shown, routed, combine = CASES[case]
    pair = twins(small_models, layout)
    pair.fused.settings = replace(pair.fused.settings, combine=combine)
    for number, (_, weight) in enumerate(pair.fused.trainable()):
        weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) / 18
    references = [
        Reference(
            torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)),
            pair.context(1, seed=9),
            identity=identity,
            weight=weight,
        )
        for seed, identity, weight in shown
    ]
    x = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(0))
    t, context = torch.tensor([37.0, 801.0]), pair.context(2, seed=1)
    masks, regions = None, None
    if routed:
        masks = torch.zeros(2, 72, 96)
        masks[0, :, :40], masks[1, 20:, 48:] = 1, 1
        regions = pair.fused.regions(masks, (9, 12))
    with torch.no_grad():
        ours = pair.fused(x, t, context, references, regions=regions)
        plain = pair.fused(x, t, context)
    theirs = host_with_faces(pair, x, t, context, references, masks)
    assert torch.allclose(ours, theirs, atol=TOLERANCE), float((ours - theirs).abs().max())
    assert not torch.allclose(ours, plain, atol=100 * TOLERANCE), "the faces must matter"
