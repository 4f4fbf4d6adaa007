"""Where a part was cut out of a picture, from the numbers of its pixels, however it was resized."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.ruler import ruler, span_on_ruler

SIZE = 4096


def resized(numbers: torch.Tensor, num: int, mode: str) -> torch.Tensor:
    """Numbers `[n]` as a row of a picture that is resized to `num` columns."""
    if mode == "bicubic":
        return F.interpolate(numbers[None, None, None].expand(1, 1, 8, -1), size=(8, num), mode=mode)[0, 0, 0]
    return F.interpolate(numbers[None, None], size=num, mode=mode)[0, 0]


@settings(max_examples=200)
@given(start=st.integers(0, SIZE - 64), length=st.integers(64, 2048), num=st.integers(64, 1024))
def test_what_was_cut_out_is_found_to_the_pixel(start: int, length: int, num: int) -> None:
    stop = min(start + length, SIZE)
    found = span_on_ruler(resized(ruler(SIZE)[start:stop], num, "nearest-exact"), SIZE)
    assert found is not None
    error = max(abs(found[0] * SIZE - start), abs(found[1] * SIZE - stop))
    # Several cuts may have the same nearest neighbours: then one of them, less than a step of the samples away.
    assert error < 1 + (stop - start) / num / 2
    if (stop - start) % num == 0 or num % (stop - start) == 0:
        assert error < 1e-6


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "bicubic", "area"])
@pytest.mark.parametrize(
    ("start", "stop", "num"), [(100, 612, 512), (100, 612, 1024), (0, 4096, 64), (3000, 4096, 137)]
)
def test_any_filter_is_read_to_a_small_part_of_a_latent_pixel(mode: str, start: int, stop: int, num: int) -> None:
    found = span_on_ruler(resized(ruler(SIZE)[start:stop], num, mode), SIZE)
    assert found is not None
    step = (stop - start) / num
    near = 0.5 * max(1.0, step) + 1 if mode == "nearest" else max(0.51, 0.02 * step)  # `nearest` shifts by half a step
    assert abs(found[0] * SIZE - start) < near and abs(found[1] * SIZE - stop) < near


@pytest.mark.parametrize("step", [1, 4, 32])
def test_a_part_of_the_resized_whole_is_found_too(step: int) -> None:
    whole = resized(ruler(SIZE), SIZE // step, "nearest-exact")
    assert span_on_ruler(whole[20:97], SIZE) == (20 * step / SIZE, 97 * step / SIZE)
    assert span_on_ruler(whole, SIZE) == (0.0, 1.0)


def test_no_part_of_a_ruler_is_no_span() -> None:
    numbers = ruler(512)
    for other in (numbers.flip(0), numbers.roll(200), torch.ones(64), torch.full((9,), torch.nan), numbers[:1]):
        assert span_on_ruler(other, 512) is None
