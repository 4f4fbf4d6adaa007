"""Token grids of odd sizes against real convolutions, and masks on them: a face never vanishes."""

from __future__ import annotations

import itertools

import pytest
import torch
from fusion_kit import columns
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.grid import (
    exclusive_tokens,
    grid_at_level,
    levels_between,
    masks_to_tokens,
    seen_elsewhere,
    view_masks,
)
from attention.routing import BACKGROUNDS, route, token_weights

SIZES = st.integers(1, 200)
DOWN = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1, device="meta")  # what SD's Downsample holds


def convolved(latent_hw: tuple[int, int], level: int) -> tuple[int, int]:
    x = torch.empty(1, 1, *latent_hw, device="meta")
    for _ in range(level):
        x = DOWN(x)
    return x.shape[-2], x.shape[-1]


def test_a_45_by_128_latent_has_these_grids() -> None:
    assert [grid_at_level((45, 128), level) for level in range(4)] == [(45, 128), (23, 64), (12, 32), (6, 16)]


@settings(max_examples=100)
@given(h=SIZES, w=SIZES, level=st.integers(0, 4))
def test_the_grid_is_what_strided_convolutions_leave(h: int, w: int, level: int) -> None:
    assert grid_at_level((h, w), level) == convolved((h, w), level)


@given(h=SIZES, w=SIZES, level=st.integers(0, 4))
def test_the_level_is_found_from_the_grid(h: int, w: int, level: int) -> None:
    grid = grid_at_level((h, w), level)
    found = levels_between((h, w), grid)
    assert grid_at_level((h, w), found) == grid and found <= level
    if max(grid_at_level((h, w), level - 1) if level else (2, 2)) > 1:
        assert found == level  # below one token no halving can be told from another


def test_a_grid_that_no_halving_gives_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a token grid of 11x32 does not follow from a latent of 45x128 by halving"):
        levels_between((45, 128), (11, 32))
    with pytest.raises(ValueError, match=r"not an SD1\.5 or SDXL UNet"):
        levels_between((64, 64), (128, 128))


def test_cells_are_averages_of_their_pixels() -> None:
    masks = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    cells = masks.unflatten(1, (8, 8)).unflatten(3, (12, 8)).mean((2, 4))
    assert torch.allclose(masks_to_tokens(masks, (8, 12)), cells.flatten(1), atol=1e-6)
    assert torch.equal(masks_to_tokens(masks, (64, 96)), masks.flatten(1))


def test_a_coarse_mask_is_interpolated_to_a_finer_grid() -> None:
    mask = torch.tensor([[[0.0, 1.0]]])
    assert torch.allclose(masks_to_tokens(mask, (1, 4)), torch.tensor([[0.0, 0.25, 0.75, 1.0]]))
    assert masks_to_tokens(mask, (3, 4)).shape == (1, 12)


@settings(max_examples=60)
@given(size=st.tuples(SIZES, SIZES), grid=st.tuples(st.integers(1, 24), st.integers(1, 24)), data=st.data())
def test_every_pixel_reaches_some_token(size: tuple[int, int], grid: tuple[int, int], data: st.DataObject) -> None:
    y, x = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    mask = torch.zeros(1, *size)
    mask[0, y, x] = 1.0
    tokens = masks_to_tokens(mask, grid)
    assert float(tokens.sum()) > 0 and float(tokens.max()) <= 1.0
    assert torch.allclose(masks_to_tokens(torch.ones(1, *size), grid), torch.ones(1, grid[0] * grid[1]))
    near = masks_to_tokens(mask, grid)[0].argmax().item()
    row, column = near // grid[1], near % grid[1]
    assert abs((row + 0.5) / grid[0] - (y + 0.5) / size[0]) <= 0.75 / grid[0] + 0.75 / size[0]
    assert abs((column + 0.5) / grid[1] - (x + 0.5) / size[1]) <= 0.75 / grid[1] + 0.75 / size[1]


def assert_exclusive(owned: Tensor, coverage: Tensor) -> None:
    assert owned.shape == coverage.shape
    assert set(owned.unique().tolist()) <= {0.0, 1.0}
    assert float(owned.sum(0).max()) <= 1.0
    present = coverage.sum(1) > 0
    if int(present.sum()) <= coverage.shape[1]:
        assert bool((owned.sum(1) >= 1)[present].all())
    assert bool((owned.sum(1) == 0)[~present].all())


@st.composite
def boxes(draw: st.DrawFn, most: int = 8) -> Tensor:
    """Masks of any size that do not overlap more than partly: boxes and single pixels, some faint."""
    size = draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    masks = torch.zeros(draw(st.integers(1, most)), *size)
    for mask in masks:
        y, x = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
        height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        mask[y : y + height, x : x + width] = draw(st.sampled_from([1.0, 1.0, 0.5, 0.01]))
    return masks


@settings(max_examples=150)
@given(masks=boxes(), grid=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_face_never_vanishes(masks: Tensor, grid: tuple[int, int]) -> None:
    coverage = masks_to_tokens(masks, grid)
    assert_exclusive(exclusive_tokens(coverage, grid), coverage)


@settings(max_examples=80)
@given(masks=boxes(most=5), grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), data=st.data())
def test_ownership_does_not_depend_on_the_order_of_identities(
    masks: Tensor, grid: tuple[int, int], data: st.DataObject
) -> None:
    rows = {tuple(mask.flatten().tolist()) for mask in masks}
    assume(len(rows) == len(masks))  # the same mask twice has no order
    order = data.draw(st.permutations(range(len(masks))))
    coverage = masks_to_tokens(masks, grid)
    assume(len({tuple(row) for row in coverage.tolist()}) == len(masks))
    assert torch.equal(exclusive_tokens(coverage[order], grid), exclusive_tokens(coverage, grid)[order])


@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (6, 16), (1, 2), (2, 1)])
def test_one_pixel_faces_in_one_corner_of_a_large_picture_are_neighbours(grid: tuple[int, int]) -> None:
    """Several faces inside one cell: one gets it, the others the nearest cells, not some far corner."""
    num = min(3, grid[0] * grid[1])
    masks = torch.zeros(num, 2048, 2048)
    for i in range(num):
        masks[i, 2040, 2040 + i] = 1.0
    coverage = masks_to_tokens(masks, grid)
    owned = exclusive_tokens(coverage, grid)
    assert_exclusive(owned, coverage)
    rows, columns_ = owned.argmax(1) // grid[1], owned.argmax(1) % grid[1]
    assert int((grid[0] - 1 - rows).max()) <= 1 and int((grid[1] - 1 - columns_).max()) <= 2
    assert float(owned[:, -1].sum()) == 1.0


def test_a_small_face_takes_a_cell_from_a_large_one_but_never_the_last() -> None:
    masks = torch.zeros(2, 64, 64)
    masks[0] = 1.0
    masks[:, 3, 5] = torch.tensor([0.0, 1.0])
    owned = exclusive_tokens(masks_to_tokens(masks, (2, 2)), (2, 2))
    assert owned.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert exclusive_tokens(masks_to_tokens(masks, (1, 1)), (1, 1)).tolist() == [[1], [0]]


def test_the_middle_column_of_an_odd_grid_belongs_to_the_same_person_in_any_order() -> None:
    masks = columns(2)
    owned = exclusive_tokens(masks_to_tokens(masks, (1, 9)), (1, 9))
    assert owned.sum(0).tolist() == [1.0] * 9
    assert torch.equal(exclusive_tokens(masks_to_tokens(masks.flip(0), (1, 9)), (1, 9)), owned.flip(0))


def test_someone_outside_the_area_is_not_brought_into_it() -> None:
    masks = columns(2, size=(64, 64))
    left = view_masks(masks, (0.0, 0.0, 1.0, 30 / 64))
    assert float(left[1].sum()) == 0
    for grid, background in itertools.product([(64, 30), (8, 4)], ("all", "none")):
        (region,) = route(left, grid, background=background)  # type: ignore[arg-type]
        assert region.identities == (0,) and region.queries is None


def test_a_token_belongs_to_someone_from_half_of_its_cell_on() -> None:
    coverage = torch.tensor([[1.0, 0.5, 0.49, 0.3], [0.0, 0.0, 0.0, 0.7]])
    assert exclusive_tokens(coverage, (1, 4)).tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]


def view_of(top: float, left: float, bottom: float, right: float, size: tuple[int, int]) -> tuple[float, ...]:
    """A view from its borders in pixels of a picture (height, width)."""
    return top / size[0], left / size[1], bottom / size[0], right / size[1]


@pytest.mark.parametrize("scale", [1, 3, 8])
def test_a_view_with_borders_on_pixels_is_these_pixels(scale: int) -> None:
    masks = torch.rand(2, 45, 64, generator=torch.Generator().manual_seed(1))
    for top, left, bottom, right in [(0, 0, 45, 64), (20, 30, 45, 64), (44, 63, 45, 64), (2, 3, 15, 10)]:
        view = view_of(top * scale, left * scale, bottom * scale, right * scale, (45 * scale, 64 * scale))
        assert torch.equal(view_masks(masks, view), masks[:, top:bottom, left:right])  # type: ignore[arg-type]


@settings(max_examples=150)
@given(masks=boxes(), data=st.data(), finer=st.integers(2, 7))
def test_a_view_between_pixels_has_the_means_of_what_its_cells_cover(
    masks: Tensor, data: st.DataObject, finer: int
) -> None:
    """The picture is `finer` times larger than its masks, and the view's borders are pixels of the picture."""
    height, width = masks.shape[1] * finer, masks.shape[2] * finer
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    seen = view_masks(masks, view_of(top, left, bottom, right, (height, width)))  # type: ignore[arg-type]
    assert min(seen.shape) >= 1 and float(seen.min()) >= 0 and float(seen.max()) <= 1 + 1e-5
    large = masks.repeat_interleave(finer, 1).repeat_interleave(finer, 2)[:, top:bottom, left:right]
    assert torch.allclose(seen.mean((1, 2)), large.mean((1, 2)), atol=1e-5)
    rows, columns_ = seen.shape[1:]
    if (bottom - top) % rows == 0 and (right - left) % columns_ == 0:
        assert torch.allclose(seen.flatten(1), masks_to_tokens(large, (rows, columns_)), atol=1e-5)


def test_what_a_view_shows_beside_the_picture_is_nobodys() -> None:
    masks = torch.ones(1, 4, 4)
    seen = view_masks(masks, (0.0, -0.5, 1.0, 1.5))
    assert seen.tolist() == [[[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]] * 4]


@pytest.mark.parametrize("view", [(0.5, 0.0, 0.5, 1.0), (0.0, 0.7, 1.0, 0.2)])
def test_a_view_without_size_is_refused(view: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="it shows nothing"):
        view_masks(torch.ones(1, 4, 4), view)  # type: ignore[arg-type]


@settings(max_examples=200)
@given(masks=boxes(), data=st.data(), soft=st.booleans(), background=st.sampled_from(BACKGROUNDS))
def test_tokens_in_a_view_see_whom_they_see_in_the_whole_picture(
    masks: Tensor, data: st.DataObject, soft: bool, background: str
) -> None:
    cell = data.draw(st.integers(1, 5))
    grid = (masks.shape[1] // cell, masks.shape[2] // cell)
    assume(min(grid) > 0)
    masks = masks[:, : grid[0] * cell, : grid[1] * cell]
    assume(bool((masks.amax((1, 2)) > 0).all()) and float(masks.sum(0).max()) <= 1)
    top, left = data.draw(st.integers(0, grid[0] - 1)), data.draw(st.integers(0, grid[1] - 1))
    bottom, right = data.draw(st.integers(top + 1, grid[0])), data.draw(st.integers(left + 1, grid[1]))
    view = view_of(top, left, bottom, right, grid)
    how = {"background": background, "soft": soft}
    whole = token_weights(masks, grid, **how).unflatten(1, grid)[:, top:bottom, left:right]  # type: ignore[arg-type]
    coverage = masks_to_tokens(masks, grid)
    assume(bool((coverage.amax(1) >= 0.5).all()))  # nobody is so small that only the whole picture shows them
    ties = coverage.unflatten(1, grid).sort(0).values
    assume(len(masks) == 1 or bool(((ties[-1] != ties[-2]) | (ties[-1] < 0.5)).all()))
    seen, away = view_masks(masks, view), seen_elsewhere(masks, view)  # type: ignore[arg-type]
    found = token_weights(seen, (bottom - top, right - left), elsewhere_I=away, **how)  # type: ignore[arg-type]
    assert torch.allclose(found, whole.flatten(1), atol=1e-6)


def test_only_who_is_in_no_other_part_of_the_picture_must_have_a_token_in_this_one() -> None:
    masks = torch.zeros(2, 8, 16)
    masks[0, :, 7:], masks[1, 3, 2] = 1, 1  # the first reaches one pixel into the left half, the second is tiny
    view = (0.0, 0.0, 1.0, 0.5)
    left, away = view_masks(masks, view), seen_elsewhere(masks, view)
    assert away.tolist() == [True, False]
    assert exclusive_tokens(masks_to_tokens(left, (2, 2)), (2, 2), away).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert exclusive_tokens(masks_to_tokens(left, (2, 2)), (2, 2)).sum(1).tolist() == [1, 1]
