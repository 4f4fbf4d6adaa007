"""Identity without trained weights: the reference's self-attention keys and values beside the picture's own.

The reference passes through the same UNet; in self-attention the picture's queries then also see the reference's keys
and values (shared attention; Hertz et al., "Style Aligned Image Generation via Shared Attention", 2023). The softmax is
`fusion.fused_attention` with the picture's own keys in the text's place: strength, schedule and routing are the same.

Legend: B rows, Q queries, K keys, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .fusion import PAPER, FaceControls, FaceKeys, fused_attention, sdpa_attend
from .routing import Region, everywhere
from .wide_heads import Attend

EPS = 1e-5


@dataclass(frozen=True, eq=False)
class Statistics:
    """Per channel over the tokens of a reference, `[1, 1, C]` each: what AdaIN gives to the picture."""

    query_mean: Tensor
    query_std: Tensor
    key_mean: Tensor
    key_std: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All four."""
        return self.query_mean, self.query_std, self.key_mean, self.key_std


def statistics(query: Tensor, key: Tensor) -> Statistics:
    """Mean and standard deviation over the tokens of a reference's queries and keys `[1, N, C]`."""
    return Statistics(*_moments(query), *_moments(key))


def adain(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """x `[B, N, C]` with its mean and deviation over the tokens replaced (Huang & Belongie 2017, eq. 8)."""
    own_mean, own_std = _moments(x)
    return ((x.float() - own_mean.float()) / own_std.float() * std.float() + mean.float()).to(x.dtype)


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    faces: Sequence[FaceKeys],
    styles: Sequence[Statistics],
    *,
    heads: int,
    attend: Attend = sdpa_attend,
    regions: Sequence[Region] | None = None,
    controls: FaceControls = PAPER,
) -> Tensor:
    """Self-attention over the picture's own keys and the faces', queries and own keys restyled by AdaIN first.

    Arguments as `fused_attention`, with the picture's own k and v `[B, K, C]` in the text's place. styles: statistics
    per reference, in the order of `faces`. A region that sees several references takes the mean of their statistics;
    one that sees none is plain self-attention.
    """
    regions = regions or everywhere(1 + max(face.identity for face in faces))
    out = torch.empty_like(q)
    for region in regions:
        queries = slice(None) if region.queries is None else region.queries
        own_q, own_k = q[:, queries], k
        style = _mean_style([s for face, s in zip(faces, styles) if face.identity in region.identities])
        if style is not None:
            restyled = adain(q, style.query_mean.to(q), style.query_std.to(q))
            own_q, own_k = restyled[:, queries], adain(k, style.key_mean.to(k), style.key_std.to(k))
        here = (replace(region, queries=None),)
        out[:, queries] = fused_attention(
            own_q, own_k, v, faces, heads=heads, attend=attend, regions=here, controls=controls
        )
    return out


def _mean_style(styles: Sequence[Statistics]) -> Statistics | None:
    if not styles:
        return None
    return Statistics(*(torch.stack(parts).mean(0) for parts in zip(*(style.tensors for style in styles))))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.float(), dim=1, keepdim=True, correction=0)
    return mean.to(x.dtype), (variance + EPS).sqrt().to(x.dtype)
