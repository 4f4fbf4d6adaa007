"""Boxes, alignment, crops, quality, pictures: pure arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faces.align import (
    ARCFACE_POINTS,
    align_face,
    crop_square,
    similarity_transform,
    transform_points,
    warp,
    whole_square,
)
from faces.boxes import keep_best, overlap_matrix
from faces.pictures import as_rgb, as_rgb_batch
from faces.quality import Quality, QualityGate, gate_problem, sharpness


def picture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)


@settings(max_examples=50)
@given(st.floats(-3.1, 3.1), st.floats(0.05, 20), st.floats(-500, 500), st.floats(-500, 500))
def test_the_fit_recovers_any_similarity(angle: float, scale: float, x: float, y: float) -> None:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    target = ARCFACE_POINTS @ turn.T + [x, y]
    matrix = similarity_transform(ARCFACE_POINTS, target)
    assert np.allclose(matrix[:, :2], turn, atol=1e-4 * scale)
    assert np.allclose(transform_points(ARCFACE_POINTS, matrix), target, atol=0.01 + 1e-4 * scale)


def test_the_fit_never_mirrors() -> None:
    mirrored = ARCFACE_POINTS * [-1, 1]
    matrix = similarity_transform(mirrored, ARCFACE_POINTS)
    assert np.linalg.det(matrix[:, :2]) > 0


def test_points_on_one_spot_are_refused() -> None:
    with pytest.raises(ValueError, match="one spot"):
        align_face(picture(50, 50), np.full((5, 2), 20, dtype=np.float32))


def test_warping_by_whole_pixels_moves_them_exactly() -> None:
    image = picture(60, 80)
    moved = warp(image, np.array([[1.0, 0.0, 5.0], [0.0, 1.0, -7.0]]), 80, 60)
    assert np.array_equal(moved[:53, 5:], image[7:, :75])
    assert not moved[53:].any() and not moved[:, :5].any()


def test_a_face_already_in_place_is_aligned_onto_itself() -> None:
    image = picture(112, 112)
    # Pillow cuts fractions off, so a pixel may be one level darker.
    assert np.abs(align_face(image, ARCFACE_POINTS).astype(int) - image)[1:-1, 1:-1].max() <= 1


def test_an_upside_down_face_is_turned() -> None:
    image = picture(112, 112)
    turned = image[::-1, ::-1]
    aligned = align_face(turned, 111 - ARCFACE_POINTS)
    assert np.abs(aligned.astype(int) - image)[1:-1, 1:-1].max() <= 1


def test_a_crop_has_the_margin_on_each_side() -> None:
    image = picture(400, 500)
    crop, matrix = crop_square(image, (200, 100, 300, 180), margin=0.3)
    assert crop.shape == (160, 160, 3)
    assert np.array_equal(crop, image[60:220, 170:330])
    assert np.allclose(transform_points(np.array([[200.0, 100.0]]), matrix), [[30, 40]])


def test_near_the_border_the_crop_moves_inwards_instead_of_smearing() -> None:
    image = picture(400, 500)
    crop, matrix = crop_square(image, (0, 0, 100, 100), margin=0.5)
    assert np.array_equal(crop, image[:200, :200])
    assert np.allclose(matrix, [[1, 0, 0], [0, 1, 0]])


def test_a_tight_picture_gives_a_smaller_crop() -> None:
    image = picture(120, 200)
    crop, _ = crop_square(image, (50, 10, 150, 110), margin=0.5)
    assert np.array_equal(crop, image[:, 40:160])


def test_a_box_over_the_border_is_padded_with_edge_pixels() -> None:
    image = picture(100, 100)
    crop, matrix = crop_square(image, (-20, -20, 130, 130), margin=0.3)
    assert crop.shape == (150, 150, 3)
    assert np.array_equal(crop[20:120, 20:120], image)
    assert (crop[:20, :20] == image[0, 0]).all() and (crop[-10:, -10:] == image[-1, -1]).all()
    assert np.allclose(matrix[:, 2], [20, 20])


def test_huge_crops_are_scaled_to_1024_with_their_points() -> None:
    image = np.zeros((3000, 3000, 3), dtype=np.uint8)
    image[1995:2006, 995:1006] = 255
    crop, matrix = crop_square(image, (500, 500, 2500, 2500), margin=0.2)
    assert crop.shape == (1024, 1024, 3)
    x, y = transform_points(np.array([[1000.0, 2000.0]]), matrix)[0]
    brightest = np.unravel_index(crop[:, :, 0].astype(float).argmax(), crop.shape[:2])
    assert np.allclose(brightest, (y, x), atol=2)


def test_the_whole_picture_becomes_a_square() -> None:
    image = picture(30, 50)
    square = whole_square(image)
    assert square.shape == (50, 50, 3)
    assert np.array_equal(square[10:40], image) and (square[0] == image[0]).all() and (square[-1] == image[-1]).all()
    assert whole_square(picture(2000, 100)).shape == (1024, 1024, 3)


def test_overlaps_and_suppression() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30], [1, 1, 11, 11]], dtype=np.float64)
    overlaps = overlap_matrix(boxes, boxes)
    assert np.allclose(np.diag(overlaps), 1) and overlaps[0, 1] == pytest.approx(0.5) and overlaps[0, 2] == 0
    assert overlaps[0, 3] == pytest.approx(81 / 119)
    assert keep_best(boxes, np.array([0.5, 0.6, 0.9, 0.7]), 0.4) == [2, 3, 1]
    assert keep_best(np.empty((0, 4)), np.empty(0), 0.4) == []


def test_sharpness_by_hand() -> None:
    flat = np.full((112, 112, 3), 90, dtype=np.uint8)
    assert sharpness(flat) == pytest.approx(0, abs=1e-3)
    checks = (np.indices((112, 112)).sum(axis=0) % 2 * 10).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    # Each pixel differs from its four neighbours by 10 in alternating directions: the Laplacian is +-40.
    assert sharpness(checks) == pytest.approx(1600, rel=1e-3)


def test_the_gate_names_everything_that_is_too_low() -> None:
    quality = Quality(size=40, sharpness=20, score=0.6)
    assert gate_problem(quality, QualityGate()) is None
    assert gate_problem(quality, QualityGate(40, 20, 0.6)) is None
    problem = gate_problem(quality, QualityGate(64, 50, 0.7))
    assert problem == (
        "the face is 40 px small, wanted are 64 px; the face's sharpness is 20, wanted is 50; "
        "the detector's score is 0.60, wanted is 0.70"
    )


def test_every_kind_of_picture_becomes_rgb_bytes() -> None:
    rgb = picture(20, 30)
    assert as_rgb(rgb) is rgb or np.array_equal(as_rgb(rgb), rgb)
    assert np.array_equal(as_rgb(rgb.astype(np.float32) / 255), rgb)
    assert np.array_equal(as_rgb(rgb.astype(np.float64) / 255), rgb)
    assert np.array_equal(as_rgb(rgb[:, :, 0]), rgb[:, :, :1].repeat(3, axis=2))
    assert np.array_equal(as_rgb(rgb[:, :, :1]), rgb[:, :, :1].repeat(3, axis=2))
    alpha = np.zeros((20, 30, 1), dtype=np.uint8)
    alpha[:10] = 255
    flat = as_rgb(np.concatenate([rgb, alpha], axis=2))
    assert np.array_equal(flat[:10], rgb[:10]) and (flat[10:] == 255).all()
    assert as_rgb(np.full((16, 16, 3), 1.7, dtype=np.float32)).max() == 255


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.full((20, 20, 3), np.nan, dtype=np.float32), "picture 2 has 1200 values that are NaN"),
        (np.full((20, 20, 3), np.inf, dtype=np.float32), "NaN or infinite"),
        (np.zeros((1, 1, 3), dtype=np.uint8), "picture 2 is 1 x 1 pixels"),
        (np.zeros((400, 15, 3), dtype=np.uint8), "picture 2 is 15 x 400 pixels"),
        (np.zeros((20, 20, 2), dtype=np.uint8), r"shape \[20, 20, 2\]"),
        (np.zeros((2, 20, 20, 3), dtype=np.uint8), r"shape \[2, 20, 20, 3\]"),
        (np.zeros((20, 20, 3), dtype=np.int32), "type int32"),
    ],
)
def test_bad_pictures_are_refused_by_number(bad: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        as_rgb_batch([picture(20, 20), bad])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="empty batch"):
        as_rgb_batch([])
