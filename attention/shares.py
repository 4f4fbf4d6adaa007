"""Who was looked at: how much of a layer's attention, or of its output, every identity gets at every query.

Legend: B rows, Q queries, I identities, C = h*d channels, h heads, d head width.

The share of a softmax that falls on some keys is the attention output itself when their values are one and all others
zero. So the shares come from the same kernel, regions and score terms as the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from einops import reduce
from torch import Tensor

from .fusion import FaceKeys

Attention = Callable[[Tensor, Sequence[FaceKeys]], Tensor]
"""A layer's attention with its queries and keys given: (text values `[B, K, C]`, faces) -> output `[B, Q, C]`."""


def attention_shares(
    attention: Attention, text_value: Tensor, faces: Sequence[FaceKeys], *, people: int, heads: int
) -> Tensor:
    """`[B, Q, I]` in [0, 1], float32: the share of the softmax on each identity's keys, averaged over the heads.

    people: how many identities there are. For attention with one softmax; its value strength must be 1. What is missing
    to 1 is the text's share. One attention serves as many identities as a head is wide: each has a channel of its own.
    """
    width = text_value.shape[-1] // heads
    nothing = torch.zeros_like(text_value)
    parts = []
    for first in range(0, people, width):
        out = attention(nothing, [_marked(face, face.identity - first, heads, width) for face in faces])
        parts.append(reduce(out.float(), "b q (h d) -> b q d", "mean", h=heads))
    return torch.cat(parts, dim=-1)[..., :people]


def output_shares(attention: Attention, text_value: Tensor, faces: Sequence[FaceKeys], *, people: int) -> Tensor:
    """`[B, Q, I]` in [0, 1], float32: the share of each identity's part in the length of all parts of the output.

    For attention that adds a face branch to the text's (decoupled): there the faces' softmax sums to 1 wherever a face
    is seen and says nothing about how much it counts. Parts: the text's output, and the branch per identity.
    """
    nothing = torch.zeros_like(text_value)
    text = attention(text_value, [_only(face, None) for face in faces])
    parts = [attention(nothing, [_only(face, i) for face in faces]) for i in range(people)]
    lengths = torch.stack([part.float().norm(dim=-1) for part in (text, *parts)], dim=-1)
    total = lengths.sum(-1, keepdim=True)
    return lengths[..., 1:] / torch.where(total > 0, total, 1.0)


def _marked(face: FaceKeys, channel: int, heads: int, width: int) -> FaceKeys:
    """The reference with values that are one in its identity's channel of every head, zero elsewhere."""
    value = torch.zeros_like(face.key)
    if 0 <= channel < width:
        value.unflatten(-1, (heads, width))[..., channel] = 1.0
    return replace(face, value=value)


def _only(face: FaceKeys, identity: int | None) -> FaceKeys:
    return face if face.identity == identity else replace(face, value=torch.zeros_like(face.value))
