"""Who sees whom: from identity masks to regions of queries (METHOD 1.4, face fusion eq. 7).

Legend: I identities, H W image pixels, Q query tokens of one layer, n queries of one region.

A face key of identity i carries the term `route_i(q) = log w_i(q)`, where `w_i(q) = m_i(q)`, plus the background's
share `1 - sum_j m_j(q)` when the background may look at faces. With hard masks `w` is exactly 0 or 1, so the term is
-inf or 0. Zero weights are never computed with: the queries are split into regions that see the same identities, so
routing needs no mask from the attention kernel and is exact under kernels that ignore masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .grid import exclusive_tokens, masks_to_tokens

Background = Literal["all", "none"]
Overlap = Literal["larger value", "first on top", "last on top"]
BACKGROUNDS: tuple[Background, ...] = ("all", "none")
OVERLAPS: tuple[Overlap, ...] = ("larger value", "first on top", "last on top")

NEGLIGIBLE = 2.0**-24  # a soft weight below this changes no float32 output; as zero it needs no arithmetic
QUANTUM = 1.5 / 255  # soft borders drawn in 8 bits may sum to one grey level more than 1 without an overlap
OVERSHOOT = 0.25  # bicubic and Lanczos resizing leave the range by less than this


@dataclass(frozen=True, eq=False)
class Region:
    """Queries that see the same identities.

    queries: positions `[n]` (int64) in the layer's token order; None means every query.
    identities: the identities whose face keys these queries see; empty means text only.
    log_weight: `[n, len(identities)]` additive terms for soft borders; None means zero everywhere.
    text: the span [start, stop) of text keys these queries see (METHOD 2.3); None means all of them.
    """

    queries: Tensor | None
    identities: tuple[int, ...]
    log_weight: Tensor | None = None
    text: tuple[int, int] | None = None

    def to(self, device: torch.device | str) -> Region:
        """The same region with its tensors on `device`."""
        queries = None if self.queries is None else self.queries.to(device)
        log_weight = None if self.log_weight is None else self.log_weight.to(device)
        return replace(self, queries=queries, log_weight=log_weight)


def everywhere(num_identities: int) -> tuple[Region, ...]:
    """One region: every query sees every identity (no routing)."""
    return (Region(None, tuple(range(num_identities))),)


def check_masks(masks_IHW: Tensor) -> None:
    """Raises ValueError unless the masks are `[I, H, W]`, finite, in [0, 1], and each covers something.

    Values slightly outside, as resizing leaves them, pass.
    """
    if masks_IHW.ndim != 3 or 0 in masks_IHW.shape:
        raise ValueError(f"masks must be [identities, height, width], got shape {list(masks_IHW.shape)}")
    if not bool(torch.isfinite(masks_IHW).all()):
        raise ValueError("a mask holds NaN or infinite values; draw it again or pass it through a threshold")
    for i, mask in enumerate(masks_IHW):
        low, high = float(mask.min()), float(mask.max())
        if low < -OVERSHOOT or high > 1 + OVERSHOOT:
            raise ValueError(
                f"the mask of identity {i + 1} holds values from {low:g} to {high:g}, accepted are 0 to 1. "
                "Scale it, or pass it through a threshold"
            )
        if high <= 0:
            raise ValueError(
                f"the mask of identity {i + 1} is empty: that person would appear nowhere. "
                "Paint a region for it, or remove the identity from the router"
            )


def resolve_overlaps(masks_IHW: Tensor, rule: Overlap = "larger value") -> Tensor:
    """Masks of which no two share a pixel's full weight: their sum is at most 1 everywhere, up to 8-bit rounding.

    Receives: masks `[I, H, W]` in [0, 1]. By eq. 7 a query inside two masks would see no face at all, so overlaps are
    decided here. `larger value`: the larger soft value wins, between equals the smaller region (someone in front of
    a group); `first on top`, `last on top`: by the identities' order.
    Returns: masks `[I, H, W]`; where nothing overlaps they are unchanged.
    Raises ValueError when an identity ends up with nothing.
    """
    if rule not in OVERLAPS:
        raise ValueError(f"unknown overlap rule {rule!r}; known: {', '.join(OVERLAPS)}")
    check_masks(masks_IHW)
    masks = masks_IHW.float().clamp(0.0, 1.0)
    order = _priority(masks, rule)
    contested = masks.sum(0) > 1.0 + QUANTUM
    ranked = masks[order]
    winner = ranked.argmax(0) if rule == "larger value" else (ranked > 0).int().argmax(0)
    keeps = torch.zeros_like(ranked).scatter_(0, winner[None], 1.0)
    resolved = torch.empty_like(masks)
    resolved[order] = torch.where(contested[None], ranked * keeps, ranked)
    _require_all_present(resolved)
    return resolved


def _priority(masks_IHW: Tensor, rule: Overlap) -> list[int]:
    num = masks_IHW.shape[0]
    if rule == "first on top":
        return list(range(num))
    if rule == "last on top":
        return list(reversed(range(num)))
    return sorted(range(num), key=lambda i: _appearance(masks_IHW[i]))


def _appearance(mask_HW: Tensor) -> tuple[float, float, float, bytes]:
    """A sort key that depends on the mask alone, so that the order in which identities are wired cannot matter."""
    area = float(mask_HW.sum())
    rows = torch.arange(mask_HW.shape[0], dtype=torch.float32) + 0.5
    columns = torch.arange(mask_HW.shape[1], dtype=torch.float32) + 0.5
    cpu = mask_HW.cpu()
    x, y = float((cpu.sum(0) * columns).sum()) / area, float((cpu.sum(1) * rows).sum()) / area
    return area, x, y, cpu.numpy().tobytes()


def _require_all_present(masks_IHW: Tensor) -> None:
    for i, mask in enumerate(masks_IHW):
        if float(mask.max()) <= 0:
            raise ValueError(
                f"the mask of identity {i + 1} lies wholly under the other masks, so nothing is left of it. "
                "Move the masks apart, or choose another overlap rule"
            )


def token_weights(
    masks_IHW: Tensor,
    grid_hw: tuple[int, int],
    *,
    background: Background,
    soft: bool,
    elsewhere_I: Tensor | None = None,
) -> Tensor:
    """Weight `w_i(q)` of every identity at every query: the exponential of METHOD 1.4's route term.

    Receives: resolved masks `[I, H, W]`, the layer's token grid; for a view of a larger picture bool `[I]` from
    `grid.seen_elsewhere`. Returns: `[I, Q]` in [0, 1]; zeros and ones only when `soft` is False.
    """
    if background not in BACKGROUNDS:
        raise ValueError(f"unknown background policy {background!r}; known: {', '.join(BACKGROUNDS)}")
    coverage = masks_to_tokens(masks_IHW, grid_hw)
    owned = exclusive_tokens(coverage, grid_hw, elsewhere_I)
    share = _softened(coverage, owned) if soft else owned
    if background == "all":
        share = share + (1.0 - share.sum(0, keepdim=True)).clamp_min(0.0)
    return torch.where(share < NEGLIGIBLE, torch.zeros_like(share), share.clamp_max(1.0))


def _softened(coverage_IQ: Tensor, owned_IQ: Tensor) -> Tensor:
    """Soft coverage, except that a face too small to reach half of any cell keeps the one cell it owns."""
    small = coverage_IQ.amax(1, keepdim=True) < 0.5
    keep = (owned_IQ * small).amax(0, keepdim=True) > 0
    return torch.where(keep, owned_IQ, coverage_IQ)


def regions_from_weights(weights_IQ: Tensor) -> tuple[Region, ...]:
    """Groups the queries by the set of identities they see. Every query is in exactly one region."""
    weights = weights_IQ.cpu()
    seen_QI = (weights > 0).T
    patterns, member = torch.unique(seen_QI, dim=0, return_inverse=True)
    if len(patterns) == 1 and bool((weights[weights > 0] == 1).all()):
        return (Region(None, _indices(patterns[0])),)
    return tuple(_region(weights, _indices(p), (member == g).nonzero()[:, 0]) for g, p in enumerate(patterns))


def _indices(pattern_I: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in pattern_I.nonzero()[:, 0])


def _region(weights_IQ: Tensor, identities: tuple[int, ...], queries: Tensor) -> Region:
    log_weight = weights_IQ[list(identities)][:, queries].T.log()
    hard = not identities or bool((log_weight == 0).all())
    return Region(queries, identities, None if hard else log_weight)


def route(
    masks_IHW: Tensor,
    grid_hw: tuple[int, int],
    *,
    background: Background = "all",
    soft: bool = False,
    elsewhere_I: Tensor | None = None,
) -> tuple[Region, ...]:
    """Regions of one layer from resolved image-space masks `[I, H, W]` (METHOD 1.4)."""
    weights = token_weights(masks_IHW, grid_hw, background=background, soft=soft, elsewhere_I=elsewhere_I)
    return regions_from_weights(weights)
