"""Regions of queries from masks: each query in exactly one, overlaps by rule, bad masks refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fusion_kit import columns, feathered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.routing import (
    BACKGROUNDS,
    NEGLIGIBLE,
    OVERLAPS,
    Region,
    check_masks,
    everywhere,
    regions_from_weights,
    resolve_overlaps,
    route,
    token_weights,
)

WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 0.25, 0.5])


def weights_of(regions: tuple[Region, ...], num: int, queries: int) -> Tensor:
    """`[I, Q]` as the regions say; every query must be named exactly once."""
    weights, times = torch.zeros(num, queries), torch.zeros(queries, dtype=torch.int64)
    for region in regions:
        at = torch.arange(queries) if region.queries is None else region.queries
        times.index_add_(0, at, torch.ones_like(at))
        for column, identity in enumerate(region.identities):
            weights[identity, at] = 1.0 if region.log_weight is None else region.log_weight[:, column].exp()
    assert times.tolist() == [1] * queries
    return weights


@settings(max_examples=100)
@given(data=st.data(), num=st.integers(1, 4), queries=st.integers(1, 30))
def test_every_query_is_in_exactly_one_region(data: st.DataObject, num: int, queries: int) -> None:
    row = st.lists(WEIGHTS, min_size=queries, max_size=queries)
    weights = torch.tensor(data.draw(st.lists(row, min_size=num, max_size=num)))
    regions = regions_from_weights(weights)
    assert torch.allclose(weights_of(regions, num, queries), weights, atol=1e-6)
    assert len({region.identities for region in regions}) == len(regions)
    assert all(bool(torch.isfinite(r.log_weight).all()) for r in regions if r.log_weight is not None)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("grid", [(12, 32), (6, 16), (45, 128), (23, 64), (1, 4)])
def test_hard_masks_route_every_token_to_its_owner(grid: tuple[int, int], background: str) -> None:
    masks = columns(3, gap=4, size=(360, 1024))
    weights = token_weights(masks, grid, background=background, soft=False)  # type: ignore[arg-type]
    regions = route(masks, grid, background=background)  # type: ignore[arg-type]
    assert torch.equal(weights_of(regions, 3, math.prod(grid)), weights)
    assert all(region.log_weight is None for region in regions)
    mine = [region for region in regions if len(region.identities) == 1]
    assert sorted(region.identities for region in mine) == [(0,), (1,), (2,)]
    free = [region for region in regions if len(region.identities) != 1]
    assert all(region.identities == ((0, 1, 2) if background == "all" else ()) for region in free)


def test_the_background_sees_everyone_or_nobody() -> None:
    masks = torch.zeros(2, 4, 4)
    masks[0, 0, 0] = masks[1, 3, 3] = 1.0
    every, none = (token_weights(masks, (4, 4), background=b, soft=False) for b in BACKGROUNDS)
    assert every.sum(1).tolist() == [15.0, 15.0] and float(every[1, 0]) == float(every[0, 15]) == 0.0
    assert none.sum(1).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="unknown background policy 'some'; known: all, none"):
        token_weights(masks, (4, 4), background="some", soft=False)  # type: ignore[arg-type]


def test_one_person_everywhere_needs_no_splitting() -> None:
    (region,) = route(torch.ones(1, 8, 8), (4, 4))
    assert region.queries is None and region.identities == (0,) and region.log_weight is None
    assert everywhere(3)[0].identities == (0, 1, 2) and everywhere(3)[0].queries is None


def test_soft_borders_are_log_biases() -> None:
    masks = torch.tensor([[[1.0, 0.75, 0.25, 0.0]], [[0.0, 0.25, 0.75, 1.0]]])
    weights = token_weights(masks, (1, 4), background="none", soft=True)
    assert torch.equal(weights, masks[:, 0])
    border = next(
        region for region in route(masks, (1, 4), background="none", soft=True) if region.identities == (0, 1)
    )
    assert border.queries is not None and border.queries.tolist() == [1, 2]
    assert border.log_weight is not None
    assert torch.allclose(border.log_weight, torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log())


def test_the_soft_background_share_goes_to_everyone() -> None:
    masks = torch.tensor([[[0.6, 0.0, 0.5]], [[0.2, 0.0, 0.5]]])
    weights = token_weights(masks, (1, 3), background="all", soft=True)
    assert torch.allclose(weights, torch.tensor([[0.8, 1.0, 0.5], [0.4, 1.0, 0.5]]))


def test_hard_masks_are_the_limit_of_soft_ones() -> None:
    masks = columns(3)
    soft, hard = (token_weights(masks, (5, 12), background="none", soft=soft) for soft in (True, False))
    assert torch.equal(soft, hard)


def test_negligible_soft_weights_are_zero() -> None:
    masks = torch.tensor([[[1.0, NEGLIGIBLE / 2, 2 * NEGLIGIBLE]]])
    assert torch.allclose(
        token_weights(masks, (1, 3), background="none", soft=True), torch.tensor([[1.0, 0.0, 2 * NEGLIGIBLE]])
    )


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (1, 3)])
def test_a_tiny_face_owns_a_token_at_full_weight(grid: tuple[int, int], soft: bool) -> None:
    masks = torch.zeros(2, 512, 512)
    masks[0, :, :200] = 1.0
    masks[1, 300, 400] = 1.0
    weights = token_weights(masks, grid, background="none", soft=soft)
    assert weights[1].tolist().count(1.0) == 1 and float(weights[0][weights[1] == 1].sum()) == 0.0


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("grid", [(5, 9), (7, 7), (6, 16), (1, 3)])
def test_order_of_identities_with_their_masks_does_not_matter(
    grid: tuple[int, int], background: str, soft: bool
) -> None:
    """Grids whose middle column two people share by halves included."""
    for masks in (columns(2), columns(3, gap=2), feathered(columns(3)), columns(4)):
        how = {"background": background, "soft": soft}
        expected = token_weights(resolve_overlaps(masks), grid, **how)  # type: ignore[arg-type]
        for order in itertools.permutations(range(len(masks))):
            shuffled = token_weights(resolve_overlaps(masks[list(order)]), grid, **how)  # type: ignore[arg-type]
            assert torch.allclose(shuffled, expected[list(order)], atol=1e-6)


# Overlaps


def rows(*masks: list[float]) -> Tensor:
    return torch.tensor(masks)[:, None]


def test_where_nothing_overlaps_masks_stay_as_they_are() -> None:
    soft = rows([1.0, 0.5, 0.2, 0.0], [0.0, 0.5, 0.8, 1.0])
    for rule in OVERLAPS:
        assert torch.equal(resolve_overlaps(soft, rule), soft)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("larger value", ([1.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.8, 1.0])),
        ("first on top", ([1.0, 0.9, 0.6, 0.0], [0.0, 0.0, 0.0, 1.0])),
        ("last on top", ([1.0, 0.0, 0.0, 0.0], [0.0, 0.6, 0.8, 1.0])),
    ],
)
def test_overlap_rules(rule: str, expected: tuple[list[float], list[float]]) -> None:
    masks = rows([1.0, 0.9, 0.6, 0.0], [0.0, 0.6, 0.8, 1.0])
    assert torch.allclose(resolve_overlaps(masks, rule), rows(*expected))  # type: ignore[arg-type]


def test_between_equals_the_smaller_person_stands_in_front() -> None:
    masks = rows([1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0])
    for order in ([0, 1], [1, 0]):
        resolved = resolve_overlaps(masks[order])
        assert torch.equal(resolved, rows([1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0])[order])


def test_two_equal_bars_across_each_other_are_decided_by_their_looks() -> None:
    """Same area and same centre, so only the shapes can tell them apart."""
    masks = torch.zeros(2, 5, 5)
    masks[0, 2, :] = masks[1, :, 2] = 1.0
    resolved = resolve_overlaps(masks)
    assert float(resolved.sum(0).max()) == 1.0
    assert torch.equal(resolve_overlaps(masks.flip(0)), resolved.flip(0))


def test_eight_bit_borders_that_sum_to_slightly_more_are_no_overlap() -> None:
    """A feathered border drawn in 8 bits: 128/255 twice. Nobody loses half a border by one grey level."""
    border = rows([1.0, 128 / 255, 0.0], [0.0, 128 / 255, 1.0])
    assert torch.equal(resolve_overlaps(border), border)


@settings(max_examples=80)
@given(data=st.data(), num=st.integers(1, 4), rule=st.sampled_from(OVERLAPS))
def test_resolved_masks_never_sum_above_one(data: st.DataObject, num: int, rule: str) -> None:
    row = st.lists(st.floats(0.0, 1.0, width=32), min_size=9, max_size=9)
    masks = torch.tensor(data.draw(st.lists(row, min_size=num, max_size=num))).unflatten(1, (3, 3))
    try:
        resolved = resolve_overlaps(masks, rule)  # type: ignore[arg-type]
    except ValueError as error:
        assert "is empty" in str(error) or "wholly under the other masks" in str(error)
        return
    assert float(resolved.sum(0).max()) <= 1.0 + 1.5 / 255
    assert bool(((resolved == masks) | (resolved == 0)).all())
    assert bool(((masks > 0).any(0) == (resolved > 0).any(0)).all())  # what somebody claimed stays claimed


# Bad masks


BAD_MASKS = {
    "wrong axes": (torch.ones(8, 8), r"masks must be \[identities, height, width\], got shape \[8, 8\]"),
    "no identity": (torch.ones(0, 8, 8), r"got shape \[0, 8, 8\]"),
    "no pixel": (torch.ones(1, 8, 0), r"got shape \[1, 8, 0\]"),
    "NaN": (torch.full((1, 4, 4), torch.nan), "holds NaN or infinite values; draw it again"),
    "infinity": (torch.full((1, 4, 4), torch.inf), "holds NaN or infinite values"),
    "all zero": (torch.stack([torch.ones(4, 4), torch.zeros(4, 4)]), r"identity 2 is empty.* Paint a region"),
    "0 to 255": (torch.full((1, 4, 4), 255.0), r"identity 1 holds values from 255 to 255.* 0 to 1"),
    "negative": (torch.cat([torch.ones(1, 2, 4), torch.full((1, 2, 4), -1.0)], 1), r"values from -1 to 1"),
}


@pytest.mark.parametrize(("masks", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_masks_are_refused(masks: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_masks(masks)
    with pytest.raises(ValueError, match=message):
        resolve_overlaps(masks)


def test_overshoot_of_a_resized_mask_is_forgiven() -> None:
    masks = torch.tensor([[[-0.06, 0.5, 1.06]]])
    assert torch.equal(resolve_overlaps(masks), torch.tensor([[[0.0, 0.5, 1.0]]]))


def test_a_mask_wholly_under_the_others_is_refused() -> None:
    masks = torch.ones(2, 4, 4)
    with pytest.raises(ValueError, match=r"identity \d lies wholly under the other masks.* Move the masks apart"):
        resolve_overlaps(masks)
    masks[1, 2:] = 0.0
    with pytest.raises(ValueError, match="identity 2 lies wholly under"):
        resolve_overlaps(masks, "first on top")
    assert resolve_overlaps(masks, "last on top").sum((1, 2)).tolist() == [8.0, 8.0]


def test_an_unknown_overlap_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown overlap rule 'mean'; known: larger value, first on top, last on top"):
        resolve_overlaps(torch.ones(1, 2, 2), "mean")  # type: ignore[arg-type]
