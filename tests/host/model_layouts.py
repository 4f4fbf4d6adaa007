"""Names and shapes of small SD1.5- and SDXL-layout models, as the host's detection reads them.

`comfy/model_detection.py`: 320 model channels and the context width decide the family; depth and width are free, except
that SDXL is known by its transformer depths. No host is needed to list or to write the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

Shape = tuple[int, ...]
MODEL_CHANNELS = 320
CLIP_WIDTH, CLIP_LAYERS, CLIP_VOCABULARY, CLIP_TOKENS = 768, 12, 49408, 77
CLIP_G_WIDTH, CLIP_G_LAYERS = 1280, 32


@dataclass(frozen=True, kw_only=True)
class UNetLayout:
    """One LDM UNet: widths per level, residual blocks per level, transformer depth per residual block."""

    widths: tuple[int, ...]
    res_blocks: int
    depth_in: tuple[int, ...]
    depth_middle: int
    depth_out: tuple[int, ...]
    context_dim: int = 768
    adm_dim: int | None = None
    in_channels: int = 4

    @property
    def num_sites(self) -> int:
        """Number of cross-attention layers."""
        return sum(self.depth_in) + self.depth_middle + sum(self.depth_out)


def _sdxl(depth: int, deepest: int, middle: int, widths: tuple[int, ...] = (320,) * 3) -> UNetLayout:
    pairs = (0, 0, depth, depth, deepest, deepest)
    outs = (deepest,) * 3 + (depth,) * 3 + (0,) * 3
    return UNetLayout(
        widths=widths,
        res_blocks=2,
        depth_in=pairs,
        depth_middle=middle,
        depth_out=outs,
        context_dim=2048,
        adm_dim=2816,
    )


LAYOUTS = {
    # 4 sites, one resolution
    "sd15_tiny": UNetLayout(widths=(320,), res_blocks=1, depth_in=(1,), depth_middle=1, depth_out=(1, 1)),
    # 7 sites, two resolutions
    "sd15_small": UNetLayout(widths=(320, 640), res_blocks=1, depth_in=(1, 1), depth_middle=1, depth_out=(1, 1, 1, 1)),
    # 16 sites with the names of the real SD1.5, at a constant width
    "sd15_full": UNetLayout(
        widths=(320,) * 4,
        res_blocks=2,
        depth_in=(1,) * 6 + (0, 0),
        depth_middle=1,
        depth_out=(0,) * 3 + (1,) * 9,
    ),
    # the real SD1.5: 860 M weights
    "sd15": UNetLayout(
        widths=(320, 640, 1280, 1280),
        res_blocks=2,
        depth_in=(1,) * 6 + (0, 0),
        depth_middle=1,
        depth_out=(0,) * 3 + (1,) * 9,
    ),
    "sd15_inpaint": UNetLayout(
        widths=(320,), res_blocks=1, depth_in=(1,), depth_middle=1, depth_out=(1, 1), in_channels=9
    ),
    # SDXL's smallest known relative (Segmind Vega): 17 sites
    "sdxl_tiny": _sdxl(1, 2, 2),
    # 70 sites with the names of the real SDXL, at a constant width
    "sdxl_full": _sdxl(2, 10, 10),
    # the real SDXL: 2.6 G weights
    "sdxl": _sdxl(2, 10, 10, widths=(320, 640, 1280)),
}


def unet_shapes(layout: UNetLayout) -> dict[str, Shape]:
    """Every weight of the UNet by its LDM name (without `model.diffusion_model.`), with its shape."""
    return dict(_unet_weights(layout))


def _unet_weights(layout: UNetLayout) -> Iterator[tuple[str, Shape]]:
    time_dim = MODEL_CHANNELS * 4
    yield from _layer("time_embed.0", time_dim, MODEL_CHANNELS)
    yield from _layer("time_embed.2", time_dim, time_dim)
    if layout.adm_dim is not None:
        yield from _layer("label_emb.0.0", time_dim, layout.adm_dim)
        yield from _layer("label_emb.0.2", time_dim, time_dim)
    yield from _layer("input_blocks.0.0", MODEL_CHANNELS, layout.in_channels, 3, 3)

    skips, width, block = [MODEL_CHANNELS], MODEL_CHANNELS, 1
    depths = iter(layout.depth_in)
    for level, level_width in enumerate(layout.widths):
        for _ in range(layout.res_blocks):
            yield from _block(f"input_blocks.{block}", width, level_width, next(depths), layout)
            width, block = level_width, block + 1
            skips.append(width)
        if level + 1 < len(layout.widths):
            yield from _layer(f"input_blocks.{block}.0.op", width, width, 3, 3)
            block += 1
            skips.append(width)

    yield from _block("middle_block", width, width, layout.depth_middle, layout)
    yield from _res_block("middle_block.2", width, width)

    block, depths = 0, iter(layout.depth_out)
    for level, level_width in reversed(list(enumerate(layout.widths))):
        for i in range(layout.res_blocks + 1):
            depth = next(depths)
            yield from _block(f"output_blocks.{block}", width + skips.pop(), level_width, depth, layout)
            width = level_width
            if level and i == layout.res_blocks:
                yield from _layer(f"output_blocks.{block}.{2 if depth else 1}.conv", width, width, 3, 3)
            block += 1
    yield from _norm("out.0", width)
    yield from _layer("out.2", 4, width, 3, 3)


def controlnet_shapes(layout: UNetLayout) -> dict[str, Shape]:
    """Every weight of a ControlNet for a UNet of this layout, in the original (LDM) names."""
    unet = dict(_unet_weights(layout))
    kept = {name: shape for name, shape in unet.items() if not name.startswith(("output_blocks.", "out."))}
    skips = _skip_widths(layout)
    zeros = [weight for i, width in enumerate(skips) for weight in _layer(f"zero_convs.{i}.0", width, width, 1, 1)]
    channels = (3, 16, 16, 32, 32, 96, 96, 256, MODEL_CHANNELS)
    hint = [
        weight
        for i, (into, out) in enumerate(pairwise(channels))
        for weight in _layer(f"input_hint_block.{2 * i}", out, into, 3, 3)
    ]
    width = layout.widths[-1]
    return {**kept, **dict(zeros), **dict(hint), **dict(_layer("middle_block_out.0", width, width, 1, 1))}


def _skip_widths(layout: UNetLayout) -> list[int]:
    """Channels of what each input block hands to the other side."""
    widths = [MODEL_CHANNELS]
    for level, width in enumerate(layout.widths):
        widths += [width] * (layout.res_blocks + (level + 1 < len(layout.widths)))
    return widths


def _layer(name: str, *shape: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _block(name: str, width_in: int, width: int, depth: int, layout: UNetLayout) -> Iterator[tuple[str, Shape]]:
    yield from _res_block(f"{name}.0", width_in, width)
    if depth:
        yield from _transformer(f"{name}.1", width, depth, layout)


def _res_block(name: str, width_in: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.in_layers.0", width_in)
    yield from _layer(f"{name}.in_layers.2", width, width_in, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", width, MODEL_CHANNELS * 4)
    yield from _norm(f"{name}.out_layers.0", width)
    yield from _layer(f"{name}.out_layers.3", width, width, 3, 3)
    if width_in != width:
        yield from _layer(f"{name}.skip_connection", width, width_in, 1, 1)


def _transformer(name: str, width: int, depth: int, layout: UNetLayout) -> Iterator[tuple[str, Shape]]:
    kernel = () if layout.context_dim != 768 else (1, 1)  # SD1.5 projects with 1x1 convolutions
    yield from _norm(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", width, width, *kernel)
    yield from _layer(f"{name}.proj_out", width, width, *kernel)
    for i in range(depth):
        inner = f"{name}.transformer_blocks.{i}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{inner}.{norm}", width)
        for attention, context in (("attn1", width), ("attn2", layout.context_dim)):
            yield from _layer(f"{inner}.{attention}.to_q", width, width, bias=False)
            yield from _layer(f"{inner}.{attention}.to_k", width, context, bias=False)
            yield from _layer(f"{inner}.{attention}.to_v", width, context, bias=False)
            yield from _layer(f"{inner}.{attention}.to_out.0", width, width)
        yield from _layer(f"{inner}.ff.net.0.proj", 8 * width, width)
        yield from _layer(f"{inner}.ff.net.2", width, 4 * width)


def _taesd_block(name: str) -> Iterator[tuple[str, Shape]]:
    for conv in (0, 2, 4):
        yield from _layer(f"{name}.conv.{conv}", 64, 64, 3, 3)


def taesd_encoder_shapes() -> dict[str, Shape]:
    """TAESD's encoder: pixels to latents, three halvings."""
    weights = [*_layer("0", 64, 3, 3, 3), *_taesd_block("1")]
    for first in (2, 6, 10):
        weights += _layer(f"{first}", 64, 64, 3, 3, bias=False)
        weights += [weight for i in range(1, 4) for weight in _taesd_block(f"{first + i}")]
    return dict([*weights, *_layer("14", 4, 64, 3, 3)])


def taesd_decoder_shapes() -> dict[str, Shape]:
    """TAESD's decoder: latents to pixels, three doublings (places 0, 2, 6, 11, 16 have no weights)."""
    weights = [*_layer("1", 64, 4, 3, 3)]
    for first in (3, 8, 13):
        weights += [weight for i in range(3) for weight in _taesd_block(f"{first + i}")]
        weights += _layer(f"{first + 4}", 64, 64, 3, 3, bias=False)
    return dict([*weights, *_taesd_block("18"), *_layer("19", 3, 64, 3, 3)])


def clip_l_shapes() -> dict[str, Shape]:
    """The text encoder of SD1.5 (the host's configuration fixes its size: 123 M weights)."""
    weights: list[tuple[str, Shape]] = [
        ("text_model.embeddings.token_embedding.weight", (CLIP_VOCABULARY, CLIP_WIDTH)),
        ("text_model.embeddings.position_embedding.weight", (CLIP_TOKENS, CLIP_WIDTH)),
    ]
    for i in range(CLIP_LAYERS):
        name = f"text_model.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights += _layer(f"{name}.self_attn.{projection}", CLIP_WIDTH, CLIP_WIDTH)
        weights += [*_norm(f"{name}.layer_norm1", CLIP_WIDTH), *_norm(f"{name}.layer_norm2", CLIP_WIDTH)]
        weights += _layer(f"{name}.mlp.fc1", 4 * CLIP_WIDTH, CLIP_WIDTH)
        weights += _layer(f"{name}.mlp.fc2", CLIP_WIDTH, 4 * CLIP_WIDTH)
    return dict([*weights, *_norm("text_model.final_layer_norm", CLIP_WIDTH)])


def clip_g_shapes() -> dict[str, Shape]:
    """The larger text encoder of SDXL in open_clip's names (695 M weights, also fixed by the host)."""
    width = CLIP_G_WIDTH
    weights: list[tuple[str, Shape]] = [
        ("token_embedding.weight", (CLIP_VOCABULARY, width)),
        ("positional_embedding", (CLIP_TOKENS, width)),
        ("text_projection", (width, width)),
    ]
    for i in range(CLIP_G_LAYERS):
        name = f"transformer.resblocks.{i}"
        weights += [(f"{name}.attn.in_proj_weight", (3 * width, width)), (f"{name}.attn.in_proj_bias", (3 * width,))]
        weights += [*_layer(f"{name}.attn.out_proj", width, width), *_norm(f"{name}.ln_1", width)]
        weights += [*_layer(f"{name}.mlp.c_fc", 4 * width, width), *_layer(f"{name}.mlp.c_proj", width, 4 * width)]
        weights += _norm(f"{name}.ln_2", width)
    return dict([*weights, *_norm("ln_final", width)])
