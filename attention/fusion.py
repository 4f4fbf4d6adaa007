"""Fused cross-attention: one softmax over text and face keys (METHOD 1.1, face fusion eqs. 1-7).

Legend: B rows, Q queries, T text keys, N face keys, K all keys, h heads, d head width, C = h*d channels.

Additive score terms (strength, length, soft borders) travel in extra head channels (`wide_heads.py`), so no attention
kernel ever needs a mask. `naive.py` holds the same formula with a dense mask, written for reading.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .community.orthogonal import OFF, V1, leading_share, leading_tokens, orthogonal_branch, require_orthogonal
from .routing import Region, everywhere
from .wide_heads import Attend, WideHeads, num_parts, split_number, split_tensor

LENGTH_MODES = ("balanced", "paper")
COMBINE_MODES = ("fused", "decoupled")


@dataclass(frozen=True, eq=False)
class FaceKeys:
    """Keys and values of one reference at one layer.

    key, value: `[1 or B, N, C]`, projected by the adapter (K_f = W_kf h_f, V_f = W_vf h_f).
    identity: whose reference this is. log_weight: log of the reference's weight plus its length term. log_size: `[N]`,
    of merged tokens (`merge.py`): a term of every token's own.
    """

    key: Tensor
    value: Tensor
    identity: int = 0
    log_weight: float = 0.0
    log_size: Tensor | None = None


@dataclass(frozen=True)
class FaceControls:
    """What a user may turn. The defaults are the paper.

    strength: factor on the face keys' share of the softmax (fused) or on the added branch (decoupled); > 0.
    key_strength, value_strength: factors on K_f and V_f. scale: the `a` of METHOD 1.1, on all scores.
    """

    strength: float = 1.0
    key_strength: float = 1.0
    value_strength: float = 1.0
    scale: float = 1.0


PAPER = FaceControls()


@dataclass(frozen=True, eq=False)
class Term:
    """What is added to the scores of one group of keys: to all the same, and `[N]` to each its own."""

    constant: float = 0.0
    each: Tensor | None = None


def sdpa_attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """PyTorch's kernel behind the `Attend` signature."""
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def length_term(mode: str, *, num_tokens: int, num_references: int, num_trained: int) -> float:
    """`length(N_r)` of METHOD 1.1: 0 (`paper`) or -log(N_r * references / N_trained) (`balanced`)."""
    if mode == "paper":
        return 0.0
    if mode != "balanced":
        raise ValueError(f"unknown length mode {mode!r}; known: {', '.join(LENGTH_MODES)}")
    return -math.log(num_tokens * num_references / num_trained)


def reference_weights(weights: Sequence[float]) -> list[float]:
    """Weights of one identity's references, all > 0, scaled to mean 1 (METHOD 1.1): only their proportions count.

    So `50, 50` is `1, 1`, one reference of weight 5 is one of weight 1, and a mix of somebody with themselves is they.
    """
    scale = len(weights) / sum(weights)
    return [weight * scale for weight in weights]


def fused_attention(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    faces: Sequence[FaceKeys],
    *,
    heads: int,
    attend: Attend = sdpa_attend,
    regions: Sequence[Region] | None = None,
    controls: FaceControls = PAPER,
) -> Tensor:
    """softmax(M + a Q K'^T / sqrt(d)) V' with K' = [K_c; K_f^1; ...; K_f^R] (METHOD 1.1).

    Receives: q `[B, Q, C]`, text_key and text_value `[B, T, C]`, faces, regions from `routing.route` (None: every
    query sees every face). Returns: `[B, Q, C]` in q's dtype. A region sees all text keys, or the span it names.
    """
    log_strength = math.log(controls.strength)

    def region_output(q_region: Tensor, region: Region) -> Tensor:
        visible = [face for face in faces if face.identity in region.identities]
        text = slice(*region.text) if region.text else slice(None)
        keys = [text_key[:, text], *(_rows(face.key, q, controls.key_strength) for face in visible)]
        values = [text_value[:, text], *(_rows(face.value, q, controls.value_strength) for face in visible)]
        terms = [Term(), *(Term(face.log_weight + log_strength, face.log_size) for face in visible)]
        columns = [None, *(region.identities.index(face.identity) for face in visible)]
        return _attend_with_terms(q_region, keys, values, terms, columns, region.log_weight, heads, attend)

    return _by_region(_scaled(q, controls.scale), regions or everywhere(_count(faces)), region_output)


def decoupled_attention(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    faces: Sequence[FaceKeys],
    *,
    heads: int,
    attend: Attend = sdpa_attend,
    regions: Sequence[Region] | None = None,
    controls: FaceControls = PAPER,
    orthogonal: str = OFF,
) -> Tensor:
    """IP-Adapter's form, for comparison: two softmaxes, outputs added, `strength` times the face branch.

    Arguments and result as `fused_attention`. orthogonal: PuLID's projection of the face branch.
    """
    require_orthogonal(orthogonal)
    no_faces: Sequence[FaceKeys] = ()
    spans = regions if any(region.text for region in regions or ()) else None  # else all queries see the same text
    text = fused_attention(
        q, text_key, text_value, no_faces, heads=heads, attend=attend, regions=spans, controls=controls
    )
    beside = None if orthogonal == OFF else text
    return text + face_branch(
        q, faces, heads=heads, attend=attend, regions=regions, controls=controls, text=beside, orthogonal=orthogonal
    )


def face_branch(
    q: Tensor,
    faces: Sequence[FaceKeys],
    *,
    heads: int,
    attend: Attend = sdpa_attend,
    regions: Sequence[Region] | None = None,
    controls: FaceControls = PAPER,
    text: Tensor | None = None,
    orthogonal: str = OFF,
) -> Tensor:
    """The added branch of `decoupled_attention`: `strength` * softmax(M_f + a Q K_f^T / sqrt(d)) V_f.

    A query that sees no face gets zero. In a soft border the branch fades with the sum of the weights there, at most 1:
    between two masks of one person there is no seam.
    text: the text's output `[B, Q, C]`, where the branch is projected: per region, over the queries that the branch is
    added to, so that nobody's region depends on another's face.
    """

    def region_output(q_region: Tensor, region: Region) -> Tensor:
        visible = [face for face in faces if face.identity in region.identities]
        if not visible:
            return torch.zeros_like(q_region)
        keys = [_rows(face.key, q, controls.key_strength) for face in visible]
        values = [_rows(face.value, q, controls.value_strength * controls.strength) for face in visible]
        terms = [Term(face.log_weight, face.log_size) for face in visible]
        columns = [region.identities.index(face.identity) for face in visible]
        out = _attend_with_terms(q_region, keys, values, terms, columns, region.log_weight, heads, attend)
        if text is not None:
            beside = text if region.queries is None else text.index_select(1, region.queries)
            bias = _dense(terms, keys, columns, region.log_weight)
            kept = 0.0 if orthogonal == V1 else _kept(q_region, keys, bias, orthogonal, heads)
            out = orthogonal_branch(out, beside, kept)
        if region.log_weight is None:
            return out
        return out * region.log_weight.exp().sum(1, keepdim=True).clamp_max(1.0).to(out)

    return _by_region(_scaled(q, controls.scale), regions or everywhere(_count(faces)), region_output)


def _kept(q: Tensor, keys: Sequence[Tensor], bias: Tensor | None, orthogonal: str, heads: int) -> Tensor:
    leading = leading_tokens([key.shape[1] for key in keys], q.device)
    return leading_share(q, _joined(keys), leading, orthogonal, heads=heads, bias=bias)


def _dense(
    terms: Sequence[Term], keys: Sequence[Tensor], columns: Sequence[int], log_weight_QI: Tensor | None
) -> Tensor | None:
    """The score terms as one tensor `[1 or Q, K]`; None where they are all the same."""
    if log_weight_QI is None and all(term.each is None and term.constant == terms[0].constant for term in terms):
        return None
    parts = []
    for term, key, column in zip(terms, keys, columns):
        each = torch.zeros(key.shape[1]) if term.each is None else term.each.float()
        part = each.to(key.device)[None] + term.constant
        parts.append(part if log_weight_QI is None else part + log_weight_QI[:, column, None].to(part))
    return torch.cat(parts, dim=1)


def _count(faces: Sequence[FaceKeys]) -> int:
    return 1 + max((face.identity for face in faces), default=-1)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _rows(face_NC: Tensor, q: Tensor, factor: float) -> Tensor:
    """The face's tensor for every row of q, in q's dtype and on q's device."""
    return _scaled(face_NC.to(q), factor).expand(q.shape[0], -1, -1)


def _by_region(q: Tensor, regions: Sequence[Region], region_output: Callable[[Tensor, Region], Tensor]) -> Tensor:
    if len(regions) == 1 and regions[0].queries is None:
        return region_output(q, regions[0])
    out = torch.empty_like(q)
    for region in regions:
        assert region.queries is not None
        out.index_copy_(1, region.queries, region_output(q.index_select(1, region.queries), region))
    return out


def _attend_with_terms(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    terms: Sequence[Term],
    columns: Sequence[int | None],
    log_weight_QI: Tensor | None,
    heads: int,
    attend: Attend,
) -> Tensor:
    """One softmax over all keys, each group of keys with its term and, in soft borders, its column."""
    common = terms[0].constant  # cancels in the softmax
    if log_weight_QI is None and all(term.constant == common and term.each is None for term in terms):
        return attend(q, _joined(keys), _joined(values), heads)
    num_columns = 0 if log_weight_QI is None else log_weight_QI.shape[1]
    wide = WideHeads.behind(q.shape[2] // heads, heads, num_parts(q.dtype) * (1 + num_columns))
    wide_q, wide_k = wide.widen([q]), wide.keys(keys)
    lengths = [key.shape[1] for key in keys]
    place = wide.d
    for parts in zip(*(_factors(term, common, wide.gain, q.dtype) for term in terms)):
        wide_q[..., place] = wide.balance
        _fill(wide_k[..., place], lengths, parts)
        place += 1
    for weights_QI in () if log_weight_QI is None else split_tensor(log_weight_QI.to(q.device) * wide.gain, q.dtype):
        wide_q[..., place : place + num_columns] = weights_QI[:, None]
        for i in range(num_columns):
            _fill(wide_k[..., place + i], lengths, [wide.balance * (column == i) for column in columns])
        place += num_columns
    return wide.attend(wide_q, wide_k, wide.widen(values), attend)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _factors(term: Term, common: float, gain: float, dtype: torch.dtype) -> tuple[float, ...] | tuple[Tensor, ...]:
    constant = term.constant - common
    if term.each is None:
        return split_number(constant * gain, dtype)
    return split_tensor((term.each.float() + constant) * gain, dtype)


def _fill(channel_BKh: Tensor, lengths: Sequence[int], values: Sequence[float | Tensor]) -> None:
    """Writes each group's value into a channel that holds zeros; neighbours with equal numbers at once."""
    start = 0
    for _, group in itertools.groupby(zip(values, lengths), key=lambda pair: _compared(pair[0])):
        same = list(group)
        stop = start + sum(length for _, length in same)
        value = same[0][0]
        if isinstance(value, Tensor):
            channel_BKh[:, start:stop] = value.to(channel_BKh)[:, None]
        elif value:
            channel_BKh[:, start:stop] = value
        start = stop


def _compared(value: float | Tensor) -> tuple[str, float]:
    return ("each", id(value)) if isinstance(value, Tensor) else ("all", value)
