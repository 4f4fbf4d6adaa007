"""Random cross-attention layers with faces, the two ways to compute them, and kernels to compute them with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attention.fusion import (
    PAPER,
    Attend,
    FaceControls,
    FaceKeys,
    decoupled_attention,
    fused_attention,
    length_term,
    sdpa_attend,
)
from attention.naive import naive_decoupled_attention, naive_fused_attention
from attention.routing import Region, regions_from_weights, token_weights

FAST = {"fused": fused_attention, "decoupled": decoupled_attention}
NAIVE = {"fused": naive_fused_attention, "decoupled": naive_decoupled_attention}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's inputs. weights: `[I, Q]` of `token_weights`, None without routing."""

    q: Tensor
    text_key: Tensor
    text_value: Tensor
    faces: tuple[FaceKeys, ...]
    heads: int
    weights: Tensor | None = None
    controls: FaceControls = field(default=PAPER)

    @property
    def regions(self) -> tuple[Region, ...] | None:
        return None if self.weights is None else regions_from_weights(self.weights)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything a gradient can reach."""
        return [self.q, self.text_key, self.text_value, *(t for face in self.faces for t in (face.key, face.value))]

    def mapped(self, change) -> Layer:
        """The same layer with every tensor changed by `change`."""
        faces = tuple(replace(face, key=change(face.key), value=change(face.value)) for face in self.faces)
        q, key, value = (change(t) for t in (self.q, self.text_key, self.text_value))
        return replace(self, q=q, text_key=key, text_value=value, faces=faces)

    def fast(self, combine: str = "fused", attend: Attend = sdpa_attend) -> Tensor:
        """The product's way."""
        inputs = self.q, self.text_key, self.text_value, self.faces
        return FAST[combine](*inputs, heads=self.heads, attend=attend, regions=self.regions, controls=self.controls)

    def naive(self, combine: str = "fused") -> Tensor:
        """METHOD's formula with a dense mask."""
        inputs = self.q, self.text_key, self.text_value, self.faces
        return NAIVE[combine](*inputs, heads=self.heads, weights_IQ=self.weights, controls=self.controls)


def make_layer(
    references: Sequence[Sequence[int]] = ((6,),),
    *,
    grid: tuple[int, int] = (5, 6),
    masks: Tensor | None = None,
    background: str = "all",
    soft: bool = False,
    length: str = "balanced",
    num_trained: int = 9,
    weight: float = 1.0,
    controls: FaceControls = PAPER,
    rows: int = 2,
    heads: int = 2,
    width: int = 5,
    text_tokens: int = 7,
    seed: int = 0,
) -> Layer:
    """references: tokens of each reference of each identity. weight: of the first reference, the others have 1."""
    channels, num_queries = heads * width, math.prod(grid)
    faces: list[FaceKeys] = []
    for identity, sizes in enumerate(references):
        for tokens in sizes:
            number = len(faces)
            term = length_term(length, num_tokens=tokens, num_references=len(sizes), num_trained=num_trained)
            term += math.log(weight) if number == 0 else 0.0
            key, value = (randn(1, tokens, channels, seed=seed + 10 * number + k) for k in (5, 6))
            faces.append(FaceKeys(key, value, identity, term))
    weights = None
    if masks is not None:
        weights = token_weights(masks, grid, background=background, soft=soft)  # type: ignore[arg-type]
    return Layer(
        q=randn(rows, num_queries, channels, seed=seed + 1),
        text_key=randn(rows, text_tokens, channels, seed=seed + 2),
        text_value=randn(rows, text_tokens, channels, seed=seed + 3),
        faces=tuple(faces),
        heads=heads,
        weights=weights,
        controls=controls,
    )


def columns(num: int, *, gap: int = 0, size: tuple[int, int] = (40, 48)) -> Tensor:
    """Masks of `num` people side by side, `gap` pixels of background between and around them."""
    masks = torch.zeros(num, *size)
    edges = [round(i * size[1] / num) for i in range(num + 1)]
    for mask, left, right in zip(masks, edges, edges[1:]):
        mask[gap : size[0] - gap, left + gap : right - gap] = 1.0
    return masks


def feathered(masks: Tensor, radius: int = 5) -> Tensor:
    """Masks with soft borders."""
    size = 2 * radius + 1
    return torch.nn.functional.avg_pool2d(masks[None], size, 1, radius, count_include_pad=False)[0]


def flash_attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, block: int = 4) -> Tensor:
    """Attention block by block with a running maximum and sum, as flash kernels do it; it knows no mask."""
    b, n, channels = q.shape
    q, k, v = (t.unflatten(2, (heads, channels // heads)).transpose(1, 2) for t in (q, k, v))
    largest = q.new_full((b, heads, n, 1), -torch.inf)
    total, out = torch.zeros_like(largest), torch.zeros_like(q)
    for start in range(0, k.shape[2], block):
        scores = q @ k[:, :, start : start + block].transpose(2, 3) / math.sqrt(channels // heads)
        new_largest = torch.maximum(largest, scores.amax(3, keepdim=True))
        shrink, weights = torch.exp(largest - new_largest), torch.exp(scores - new_largest)
        total = total * shrink + weights.sum(3, keepdim=True)
        out = out * shrink + weights @ v[:, :, start : start + block]
        largest = new_largest
    return (out / total).transpose(1, 2).flatten(2)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Relative to the second one's largest value, at least 1."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1.0))
