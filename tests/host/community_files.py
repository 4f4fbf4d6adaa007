"""Synthetic community files with the published tensor names and shapes, for tests with and without the host.

`depth` is the number of resampler layers: the one shape that is free; files published so far have 4 (PuLID v1.1: 10).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]
CONTEXT = {"sd15": 768, "sdxl": 2048}
# Widths in the files' order down, up, middle, written out by hand from the published files.
WIDTHS = {
    "sd15": [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
    "sdxl": [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
}
TOKENS = {"plus": 16, "instantid": 16, "portrait": 16, "pulid-v1.1": 32}


def _linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (out, into)}
    return {**shapes, f"{name}.bias": (out,)} if bias else shapes


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resampler_layers(dim: int, heads: int, depth: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for n in range(depth):
        attention, forward = f"layers.{n}.0", f"layers.{n}.1"
        shapes |= {**_norm(f"{attention}.norm1", dim), **_norm(f"{attention}.norm2", dim)}
        shapes |= _linear(f"{attention}.to_q", heads * 64, dim, bias=False)
        shapes |= _linear(f"{attention}.to_kv", 2 * heads * 64, dim, bias=False)
        shapes |= _linear(f"{attention}.to_out", dim, heads * 64, bias=False)
        shapes |= _norm(f"{forward}.0", dim)
        shapes |= {
            **_linear(f"{forward}.1", 4 * dim, dim, bias=False),
            **_linear(f"{forward}.3", dim, 4 * dim, bias=False),
        }
    return shapes


def _resampler(dim: int, heads: int, queries: int, into: int, out: int, depth: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"latents": (1, queries, dim)} if queries else {}
    shapes |= {**_linear("proj_in", dim, into), **_linear("proj_out", out, dim), **_norm("norm_out", out)}
    return shapes | _resampler_layers(dim, heads, depth)


def _mapping(name: str, into: int, out: int) -> dict[str, Shape]:
    return {
        **_linear(f"{name}.0", 1024, into),
        **_norm(f"{name}.1", 1024),
        **_linear(f"{name}.3", 1024, 1024),
        **_norm(f"{name}.4", 1024),
        **_linear(f"{name}.6", out, 1024),
    }


def image_proj_shapes(family: str, base: str, depth: int = 4) -> dict[str, Shape]:
    """Shapes below `image_proj.` of one family, as its project published them."""
    context = CONTEXT[base]
    plus_dim = {"sd15": 768, "sdxl": 1280}[base]
    if family == "standard":
        return {**_linear("proj", 4 * context, 1024), **_norm("norm", context)}
    if family == "plus":
        return _resampler(plus_dim, plus_dim // 64, 16, 1280, context, depth)
    if family == "full-face":
        return {**_linear("proj.0", 1280, 1280), **_linear("proj.2", context, 1280), **_norm("proj.3", context)}
    if family in ("faceid", "portrait"):
        tokens = TOKENS.get(family, 4)
        return {**_linear("proj.0", 1024, 512), **_linear("proj.2", tokens * context, 1024), **_norm("norm", context)}
    if family == "faceid-plus":
        inner = _resampler(context, context // 64, 0, 1280, context, depth)
        return image_proj_shapes("faceid", base) | {f"perceiver_resampler.{k}": v for k, v in inner.items()}
    if family == "instantid":
        return _resampler(1280, 20, 16, 512, context, depth)
    if family == "pulid-v1":
        mappings = [_mapping("body", 1280, 5 * context)]
        mappings += [_mapping(f"mapping{part}_{i}", 1024, context) for i in range(5) for part in ("", "_patch")]
        return {name: shape for mapping in mappings for name, shape in mapping.items()}
    if family == "pulid-v1.1":
        shapes: dict[str, Shape] = {"latents": (1, 32, 1024), "proj_out": (1024, context)}
        for i in range(5):
            shapes |= _mapping(f"mapping_{i}", 1024, 1024)
        return shapes | _mapping("id_embedding_mapping", 1280, 5 * 1024) | _resampler_layers(1024, 16, depth)
    raise KeyError(family)


def attention_shapes(widths: Sequence[int], context: int) -> dict[str, Shape]:
    """`<odd number>.to_k_ip.weight` and `to_v_ip` for layers of these widths."""
    return {f"{2 * i + 1}.to_{part}_ip.weight": (width, context) for i, width in enumerate(widths) for part in "kv"}


def lora_shapes(widths: Sequence[int], context: int, rank: int = 128) -> dict[str, Shape]:
    """FaceID's LoRA on q, k, v and out of every attn1 (even numbers) and attn2 (odd numbers)."""
    shapes: dict[str, Shape] = {}
    for number in range(2 * len(widths)):
        width = widths[number // 2]
        for part in ("q", "k", "v", "out"):
            into = context if number % 2 and part in "kv" else width
            shapes[f"{number}.to_{part}_lora.down.weight"] = (rank, into)
            shapes[f"{number}.to_{part}_lora.up.weight"] = (width, rank)
    return shapes


def file_shapes(
    family: str, base: str, *, depth: int = 4, widths: Sequence[int] | None = None, rank: int = 128
) -> dict[str, Shape]:
    """All shapes of a file, as `image_proj.*` and `ip_adapter.*`."""
    widths = WIDTHS[base] if widths is None else widths
    shapes = {f"image_proj.{name}": shape for name, shape in image_proj_shapes(family, base, depth).items()}
    shapes |= {f"ip_adapter.{name}": shape for name, shape in attention_shapes(widths, CONTEXT[base]).items()}
    if family in ("faceid", "faceid-plus"):
        shapes |= {f"ip_adapter.{name}": shape for name, shape in lora_shapes(widths, CONTEXT[base], rank).items()}
    return shapes


def random_tensors(
    shapes: Mapping[str, Shape], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Gaussian weights of gain about 1, norms near 1; each name has its own seed."""
    return {name: _random(name, shape, seed).to(dtype) for name, shape in shapes.items()}


def _random(name: str, shape: Shape, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode())))
    if len(shape) == 1:
        return values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return values / math.sqrt(shape[-1])


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As `.bin` files hold them: a table per part."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        parts.setdefault(part, {})[rest] = tensor
    return parts


def as_pulid(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names PuLID's own files use."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("image_proj.", "id_adapter.").replace("ip_adapter.", "id_adapter_attn_layers.")
        renamed[name.replace("to_k_ip", "id_to_k").replace("to_v_ip", "id_to_v")] = tensor
    return renamed
