"""Crops, buckets, face outlines and head turns, by hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.prepare.config import MaskConfig, SelectConfig
from training.prepare.crops import buckets, largest_box, nearest_bucket, square_around
from training.prepare.filters import count_people, first_failure, yaw_degrees
from training.prepare.masks import convex_hull, face_outline
from training.prepare.pack import draw_mask, to_target

POINTS = np.array([[40.0, 50.0], [80.0, 50.0], [60.0, 70.0], [45.0, 90.0], [75.0, 90.0]])
BOX = np.array([30.0, 20.0, 90.0, 110.0])


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0.4, 2.5),
    st.tuples(st.floats(-100, 3100), st.floats(-100, 3100)),
)
def test_crop_is_inside_as_large_as_possible_and_has_the_shape(
    width: int, height: int, aspect: float, center: tuple[float, float]
) -> None:
    x0, y0, x1, y1 = largest_box(width, height, aspect, center)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert x1 - x0 == width or y1 - y0 == height
    exact = min(width, height * aspect), min(height, width / aspect)
    assert abs(x1 - x0 - exact[0]) <= 1 and abs(y1 - y0 - exact[1]) <= 1


def test_crop_follows_the_face_to_the_border() -> None:
    assert largest_box(100, 300, 1.0, (50, 20)) == (0, 0, 100, 100)
    assert largest_box(100, 300, 1.0, (50, 150)) == (0, 100, 100, 200)
    assert largest_box(100, 300, 1.0, (50, 290)) == (0, 200, 100, 300)


def test_buckets_fit_the_area_and_the_shape() -> None:
    sizes = buckets(1024, 64, 2.0)
    assert (1024, 1024) in sizes and all((height, width) in sizes for width, height in sizes)
    assert all(w % 64 == 0 and h % 64 == 0 and w * h <= 1024**2 and max(w / h, h / w) <= 2 for w, h in sizes)
    assert all(w * (h + 64) > 1024**2 or (w + 64) * h > 1024**2 for w, h in sizes)
    assert nearest_bucket(3000, 3000, sizes) == (1024, 1024)
    assert nearest_bucket(9000, 100, sizes) == max(sizes, key=lambda size: size[0] / size[1])


@pytest.mark.parametrize("degrees", [-60, -20, 0, 35, 70])
def test_yaw_is_recovered_from_a_turned_head(degrees: float) -> None:
    angle = math.radians(degrees)
    for tilt in (0.0, 0.4):
        head = np.zeros((5, 2))
        head[0, 0], head[1, 0], head[2, 0] = -math.cos(angle), math.cos(angle), math.sin(angle)
        head[2, 1] = 0.7
        turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
        assert yaw_degrees(head @ turn.T * 40 + 100) == pytest.approx(degrees, abs=1e-6)


def test_profile_with_both_eyes_on_one_spot_is_90_degrees() -> None:
    assert yaw_degrees(np.zeros((5, 2))) == 90.0


def test_small_bystanders_do_not_count() -> None:
    boxes = [0, 0, 100, 100, 0, 0, 40, 40, 0, 0, 10, 10.0]
    assert [count_people(boxes, share) for share in (0.0, 0.1, 0.5)] == [3, 2, 1]


GOOD = {
    "n_faces": 1,
    "score": 0.9,
    "face_side": 200.0,
    "face_area": 0.2,
    "yaw": 5.0,
    "sharpness": 300.0,
    "norm": 20.0,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"n_faces": 2}, "too_many_faces"),
        ({"score": 0.5}, "low_score"),
        ({"face_side": 90.0}, "face_too_small"),
        ({"face_area": 0.01}, "face_area"),
        ({"yaw": -70.0}, "pose"),
        ({"sharpness": 5.0}, "blurry"),
        ({"norm": 3.0}, "low_norm"),
    ],
)
def test_each_filter_has_its_reason(change: dict[str, float], reason: str | None) -> None:
    failure = first_failure(GOOD | change, SelectConfig(min_sharpness=50, min_norm=10))
    assert (failure["reason"] if failure else None) == reason


def test_hull_drops_inner_points() -> None:
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4], [2, 2], [1, 3]], dtype=float)
    assert sorted(map(tuple, convex_hull(square))) == [(0, 0), (0, 4), (4, 0), (4, 4)]


@pytest.mark.parametrize("shape", ["ellipse", "landmarks", "box"])
def test_outline_covers_eyes_and_mouth_and_grows(shape: str) -> None:
    areas = []
    for dilate in (0.0, 0.3):
        outline = face_outline(BOX, POINTS, MaskConfig(shape=shape, dilate=dilate))
        planned = {"width": 120, "height": 130, "target_box": [0, 0, 120, 130], "outline": outline.reshape(-1).tolist()}
        mask = np.asarray(draw_mask(planned))
        assert all(mask[round(y), round(x)] == 255 for x, y in POINTS)
        areas.append(np.count_nonzero(mask))
    assert areas[1] / areas[0] == pytest.approx(1.3**2, rel=0.15)


def test_ellipse_has_the_area_of_its_box_and_turns_with_the_eyes() -> None:
    upright = face_outline(BOX, POINTS, MaskConfig(dilate=0.0))
    assert upright.min(axis=0) == pytest.approx([30, 20], abs=0.5) and upright.max(axis=0) == pytest.approx(
        [90, 110], abs=0.5
    )
    lying = POINTS.copy()
    lying[1] = lying[0] + [0, 40]
    turned = face_outline(BOX, lying, MaskConfig(dilate=0.0))
    assert np.ptp(turned, axis=0) == pytest.approx([90, 60], abs=0.5)


def test_points_move_with_the_crop() -> None:
    planned = {"target_box": [10, 20, 110, 70], "width": 200, "height": 100}
    assert to_target(np.array([[10.0, 20.0], [110.0, 70.0]]), planned).tolist() == [[0, 0], [200, 100]]


@given(st.integers(20, 400), st.integers(20, 400), st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 1.2))
def test_a_square_around_a_face_lies_inside_and_keeps_its_middle_where_it_can(
    width: int, height: int, at_x: float, at_y: float, size: float
) -> None:
    side = size * min(width, height)
    x, y = at_x * width, at_y * height
    x0, y0, x1, y1 = square_around((x - side / 2, y - side / 2, x + side / 2, y + side / 2), width, height, 0.3)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert x1 - x0 == y1 - y0 == min(width, height, max(1, round(side * 1.6)))
    if x0 > 0 and x1 < width:
        assert abs((x0 + x1) / 2 - x) <= 1
