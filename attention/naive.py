"""METHOD 1.1-1.4 as it is written, with a dense mask: for reading and for testing `fusion.py`, not for speed.

Legend: B rows, Q queries, T text keys, N face keys of one reference, K = T + all N, h heads, d head width, I people.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from .fusion import PAPER, FaceControls, FaceKeys


def naive_fused_attention(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    faces: Sequence[FaceKeys],
    *,
    heads: int,
    weights_IQ: Tensor | None = None,
    controls: FaceControls = PAPER,
) -> Tensor:
    """out = softmax(M + a Q K'^T / sqrt(d)) V'. Shapes as `fusion.fused_attention`; weights from `token_weights`."""
    keys = [text_key] + [controls.key_strength * face.key.expand(q.shape[0], -1, -1) for face in faces]
    values = [text_value] + [controls.value_strength * face.value.expand(q.shape[0], -1, -1) for face in faces]
    terms = [torch.zeros(q.shape[1], text_key.shape[1])]
    terms += [math.log(controls.strength) + _face_terms(face, q.shape[1], weights_IQ) for face in faces]
    return _softmax_attention(q, torch.cat(keys, 1), torch.cat(values, 1), torch.cat(terms, 1), heads, controls.scale)


def naive_decoupled_attention(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    faces: Sequence[FaceKeys],
    *,
    heads: int,
    weights_IQ: Tensor | None = None,
    controls: FaceControls = PAPER,
    orthogonal: str = "off",
) -> Tensor:
    """Two softmaxes: the text's, plus strength times the faces' (zero where no face may be seen).

    orthogonal: as `fusion.decoupled_attention`; here for one region, where every query sees every face.
    """
    no_terms = torch.zeros(q.shape[1], text_key.shape[1])
    text = _softmax_attention(q, text_key, text_value, no_terms, heads, controls.scale)
    k = torch.cat([controls.key_strength * face.key.expand(q.shape[0], -1, -1) for face in faces], 1)
    v = torch.cat([controls.value_strength * face.value.expand(q.shape[0], -1, -1) for face in faces], 1)
    M = torch.cat([_face_terms(face, q.shape[1], weights_IQ) for face in faces], 1)
    M = M.masked_fill(M.isneginf().all(1, keepdim=True), 0.0)  # a row that sees no face: a softmax of -inf is NaN ...
    face = _softmax_attention(q, k, v, M, heads, controls.scale)
    if orthogonal != "off":
        assert weights_IQ is None
        kept = 0.0 if orthogonal == "v1" else _leading_share(controls.scale * q, k, M, faces, heads, orthogonal == "v2")
        face = face - (1 - kept) * _along(face, text)
    fade = torch.ones(q.shape[1]) if weights_IQ is None else weights_IQ.sum(0).clamp(max=1)  # ... and fades out here
    return text + controls.strength * fade[None, :, None].to(q) * face


def _along(face: Tensor, text: Tensor) -> Tensor:
    """Of every channel of `[B, Q, C]`, a vector over the queries: its part in the direction of the text's."""
    out = torch.zeros_like(face)
    for row in range(face.shape[0]):
        for channel in range(face.shape[2]):
            t, f = text[row, :, channel], face[row, :, channel]
            out[row, :, channel] = t * (t @ f) / (t @ t)
    return out


def _leading_share(q: Tensor, k: Tensor, M_QK: Tensor, faces: Sequence[FaceKeys], heads: int, per_head: bool) -> Tensor:
    """v2's share of the face's first five tokens: per head and pixel, or of all channels and the whole picture."""
    starts: list[int] = []
    start = 0
    for face in faces:
        starts += range(start, start + min(5, face.key.shape[1]))
        start += face.key.shape[1]
    width = q.shape[-1] // heads if per_head else q.shape[-1]
    shares = []
    for first in range(0, q.shape[-1], width):
        scores = q[..., first : first + width] @ k[..., first : first + width].transpose(1, 2)
        shares.append((scores + M_QK).softmax(-1)[..., starts].sum(-1, keepdim=True))
    share = torch.stack(shares).mean(0)
    return share if per_head else share.mean(1, keepdim=True)


def _face_terms(face: FaceKeys, num_queries: int, weights_IQ: Tensor | None) -> Tensor:
    """`[Q, N]`: log weight + length of the reference, route_i(q) = log w_i(q), log size of a merged token."""
    route = torch.zeros(num_queries) if weights_IQ is None else weights_IQ[face.identity].log()
    sizes = torch.zeros(face.key.shape[1]) if face.log_size is None else face.log_size
    return (face.log_weight + route)[:, None] + sizes[None]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, M_QK: Tensor, heads: int, scale: float) -> Tensor:
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    scores = scale * torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    attention = torch.softmax(M_QK.to(scores) + scores, dim=-1)
    return rearrange(torch.einsum("bhqk,bhkd->bhqd", attention, v), "b h n d -> b n (h d)")
