"""The router's preview: colours, numbers and names that can be seen at any size."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

GREY = 36


@pytest.fixture(scope="module")
def module(pack: Any) -> Any:
    return pack.submodule("nodes.routing_preview")


def halves(height: int, width: int) -> list[np.ndarray]:
    left = np.zeros((height, width), dtype=np.float32)
    left[:, : width // 2] = 1
    return [left, 1 - left]


def label_pixels(drawn: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a label's full colour stands: regions are only tinted with it."""
    return (drawn == np.array(colour)).all(axis=-1)


def test_regions_are_tinted_with_their_colours_over_the_picture(module):
    picture = np.full((600, 800, 3), 200, dtype=np.uint8)
    drawn = module.draw_routing(halves(600, 800), ["", ""], picture)
    assert drawn.shape == picture.shape and (picture == 200).all()
    for number, column in enumerate((100, 700)):
        wanted = (np.array(module.colour_of(number)) + 200) / 2
        assert np.abs(drawn[50, column] - wanted).max() <= 1


def test_a_soft_mask_is_tinted_softly_and_the_rest_is_left_alone(module):
    mask = np.zeros((600, 600), dtype=np.float32)
    mask[:300, :300], mask[:300, 300:] = 1.0, 0.5
    drawn = module.draw_routing([mask], [""], np.full((600, 600, 3), 100, dtype=np.uint8)).astype(float)
    full, half = drawn[10, 10] - 100, drawn[10, 590] - 100
    assert np.abs(half - full / 2).max() <= 1 and (drawn[400:] == 100).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (64, 96), (512, 768), (2171, 3000), (33, 17)])
def test_numbers_are_readable_at_any_size(module, height, width):
    masks = halves(height, width) if width > 1 else [np.ones((1, 1), dtype=np.float32)]
    drawn = module.draw_routing(masks, [""] * len(masks))
    assert 512 <= max(drawn.shape[:2]) <= 1536
    for number in range(len(masks)):
        rows, columns = np.nonzero(label_pixels(drawn, module.colour_of(number)))
        assert rows.max() - rows.min() >= 14, "the label is at least as high as small print"
        middle = columns.mean() / drawn.shape[1]
        assert len(masks) == 1 or (middle < 0.5) == (number == 0)


def test_another_number_and_a_name_are_another_writing(module):
    one, two = halves(512, 512)
    first, swapped = module.draw_routing([one, two], ["", ""]), module.draw_routing([two, one], ["", ""])
    named = module.draw_routing([one, two], ["Anna", ""])
    colours = [module.colour_of(0), module.colour_of(1)]
    assert label_pixels(first, colours[0]).sum() != label_pixels(swapped, colours[1]).sum()
    assert label_pixels(named, colours[0]).sum() > 2 * label_pixels(first, colours[0]).sum()
    assert np.array_equal(named[:, 256:], first[:, 256:])


def test_a_name_that_the_font_cannot_write_leaves_the_number(module):
    masks = halves(512, 512)
    assert np.array_equal(module.draw_routing(masks, ["李雷", ""]), module.draw_routing(masks, ["", ""]))


def test_a_long_name_is_cut(module):
    cut, longer = (module.draw_routing(halves(512, 512), ["x" * length, ""]) for length in (40, 300))
    assert np.array_equal(cut, longer)
    columns = np.nonzero(label_pixels(cut, module.colour_of(0)))[1]
    assert 60 < columns.max() - columns.min() < 360


def test_a_ring_and_a_thin_line_carry_their_label_on_them(module):
    y, x = np.mgrid[:600, :600]
    distance = np.hypot(y - 300, x - 300)
    ring = ((distance < 290) & (distance > 220)).astype(np.float32)
    line = np.zeros((600, 600), dtype=np.float32)
    line[:, 300] = 1
    drawn = module.draw_routing([ring, line * (1 - ring)], ["", ""])
    rows, columns = np.nonzero(label_pixels(drawn, module.colour_of(0)))
    assert 200 < np.hypot(rows.mean() - 300, columns.mean() - 300) < 310
    assert abs(np.nonzero(label_pixels(drawn, module.colour_of(1)))[1].mean() - 300) < 12


def test_people_without_a_place_are_listed(module):
    one, _ = halves(512, 512)
    drawn = module.draw_routing([one, None, None], ["Anna", "Ben", "Cleo"])
    for number in (1, 2):
        rows, columns = np.nonzero(label_pixels(drawn, module.colour_of(number)))
        assert rows.max() < 70 and columns.min() < 10
    assert (module.draw_routing([None], [""])[300:] == GREY).all()


def test_no_two_people_share_a_colour(module):
    colours = np.array([module.colour_of(number) for number in range(32)], dtype=float)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 12
