"""The EVA02-CLIP-L/14-336 vision tower PuLID looks through (arXiv 2303.11331), read from its published weights.

A ViT with rotary positions on the patch tokens, a LayerNorm inside attention and inside the SwiGLU, and no key bias.
The host has no such tower, and the public implementation needs timm and xformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..files import require_finite
from .container import Container, open_community
from .families import EVA, EVA_LEVELS
from .modules import Weights, layer_norm, linear, under

HEAD_WIDTH = 64
EPSILON = 1e-6
TRAINED_GRID = 16
"""The tower's rotary positions are those of a 16 x 16 grid, stretched over the grid at hand."""
LEVEL_STEP = 4
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_MARK = "blocks.0.attn.inner_attn_ln.weight"


@dataclass(frozen=True, eq=False)
class EvaTower:
    """Weights of the vision tower by their published names without `visual.`."""

    weights: dict[str, Tensor]

    @property
    def patch(self) -> int:
        """Side of a patch, pixels (14)."""
        return self.weights["patch_embed.proj.weight"].shape[-1]

    @property
    def image_size(self) -> int:
        """Side of the square pictures it takes, pixels (336)."""
        return self.patch * round((self.weights["pos_embed"].shape[1] - 1) ** 0.5)


def is_eva_tower(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file holds this kind of tower, bare or as the `visual.` part of a whole EVA-CLIP."""
    return any(f"{prefix}{_MARK}" in shapes for prefix in ("", "visual."))


def load_eva_tower(path: Path | str) -> EvaTower:
    """Reads the tower. Raises ValueError when the file is something else or damaged."""
    container: Container = open_community(path)
    if not is_eva_tower(container.shapes):
        raise ValueError(f"{container.path.name} is no EVA-CLIP vision tower; PuLID needs {EVA}")
    tensors = container.tensors()
    weights = under(tensors, "visual.") if f"visual.{_MARK}" in tensors else tensors
    require_finite(container.path.name, weights)
    return EvaTower(weights)


@torch.no_grad()
def look(tower: EvaTower, pictures: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Image embeddings `[R, 768]` and five levels of features `[R, 1 + patches, 1024]` of `[R, 3, S, S]` pictures.

    Pictures are normalised with `MEAN` and `STD`. A level is what enters blocks 4, 8, 12, 16 and 20.
    """
    weights = tower.weights
    x = _embedded(weights, pictures.float())
    grid = pictures.shape[-1] // tower.patch
    cos, sin = rotation(grid, x.device)
    levels = []
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for number in range(depth):
        if number % LEVEL_STEP == 0 and 0 < number <= LEVEL_STEP * EVA_LEVELS:
            levels.append(x)
        block = under(weights, f"blocks.{number}.")
        x = x + _attention(under(block, "attn."), layer_norm(block, "norm1", x, EPSILON), cos, sin)
        x = x + _swiglu(under(block, "mlp."), layer_norm(block, "norm2", x, EPSILON))
    return linear(weights, "head", layer_norm(weights, "norm", x, EPSILON)[:, 0]), tuple(levels)


def _embedded(weights: Weights, pictures: Tensor) -> Tensor:
    kernel, bias = weights["patch_embed.proj.weight"].float(), weights["patch_embed.proj.bias"].float()
    patches = F.conv2d(pictures, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = weights["cls_token"].float().expand(len(pictures), -1, -1)
    return torch.cat([first, patches], dim=1) + weights["pos_embed"].float()


def rotation(grid: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin `[grid * grid, 32]` of the angle of every channel pair: half the pairs turn with y, half with x."""
    pairs = HEAD_WIDTH // 4
    frequencies = 10000.0 ** (-torch.arange(pairs, device=device).float() / pairs)
    angles = torch.arange(grid, device=device)[:, None] * (TRAINED_GRID / grid) * frequencies
    rows, columns = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
    both = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return both.cos(), both.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs of all tokens but the first: `[R, h, 1 + patches, 64]`."""
    pairs = x[:, :, 1:].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([x[:, :, :1], turned], dim=2)


def _attention(weights: Weights, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query = linear(weights, "q_proj", x) + weights["q_bias"].float()
    value = linear(weights, "v_proj", x) + weights["v_bias"].float()
    heads = (rearrange(t, "r n (h d) -> r h n d", d=HEAD_WIDTH) for t in (query, linear(weights, "k_proj", x), value))
    q, k, v = heads
    out = F.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v)
    out = rearrange(out, "r h n d -> r n (h d)")
    return linear(weights, "proj", layer_norm(weights, "inner_attn_ln", out, EPSILON))


def _swiglu(weights: Weights, x: Tensor) -> Tensor:
    gated = F.silu(linear(weights, "w1", x)) * linear(weights, "w2", x)
    return linear(weights, "w3", layer_norm(weights, "ffn_ln", gated, EPSILON))
