"""Choosing, assigning and separating people, and the numbered preview."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from faces.assign import assign_by_order, assign_by_similarity
from faces.detect import find_faces
from faces.embedding import cosine_matrix
from faces.encoder import Face, FaceEncoder
from faces.people import BACKGROUND, body_labels, head_labels, label_masks, open_segmenter, person_map
from faces.preview import OTHER, USED, draw_faces
from faces.select import ORDERS, order_faces, pick_face

MakeFace = Callable[..., Face]


@pytest.fixture
def three(make_face: MakeFace) -> list[Face]:
    """Left and low, middle and large, right and high."""
    return [make_face(40, 160, 50), make_face(150, 100, 90), make_face(320, 30, 60)]


def test_orders_by_hand(three: list[Face]) -> None:
    expected = {
        "largest": [1, 2, 0],
        "left to right": [0, 1, 2],
        "right to left": [2, 1, 0],
        "top to bottom": [2, 1, 0],
        "most similar": [2, 0, 1],
    }
    assert set(expected) == set(ORDERS)
    for order, indices in expected.items():
        assert order_faces(three, order, [0.2, -0.1, 0.7]) == indices, order


def test_numbers_count_from_one_and_are_checked() -> None:
    assert [pick_face([4, 7, 5], number) for number in (1, 2, 3)] == [4, 7, 5]
    for number in (0, -1, 4):
        with pytest.raises(ValueError, match="3 faces were found; choose a number from 1 to 3"):
            pick_face([4, 7, 5], number)


def test_unknown_orders_and_missing_likeness_are_refused(three: list[Face]) -> None:
    with pytest.raises(ValueError, match="unknown order of faces 'best'"):
        order_faces(three, "best")
    with pytest.raises(ValueError, match="needs an identity"):
        order_faces(three, "most similar")


def test_identities_are_assigned_by_place_and_size(three: list[Face]) -> None:
    assert assign_by_order(three, 3, "left to right") == [0, 1, 2]
    assert assign_by_order(three, 3, "largest") == [1, 2, 0]
    assert assign_by_order(three, 3, "top to bottom") == [2, 1, 0]


def test_passers_by_do_not_shift_the_order(three: list[Face]) -> None:
    assert assign_by_order(three, 2, "left to right") == [1, 2]


def test_similarity_assignment_is_the_best_of_all() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        faces, people = rng.normal(size=(5, 8)), rng.normal(size=(3, 8))
        indices, cosines = assign_by_similarity(faces, people)
        table = cosine_matrix(people, faces)
        best = max(sum(table[i, f] for i, f in enumerate(chosen)) for chosen in itertools.permutations(range(5), 3))
        assert sum(cosines) == pytest.approx(best, abs=1e-5)
        assert len(set(indices)) == 3


def test_similarity_gives_each_person_a_face_even_when_two_want_the_same() -> None:
    faces = np.array([[1.0, 0.0], [0.8, 0.6]])
    people = np.array([[1.0, 0.1], [1.0, 0.0]])
    assert assign_by_similarity(faces, people)[0] == [1, 0]


def test_too_few_faces_are_refused_with_both_counts(three: list[Face]) -> None:
    with pytest.raises(ValueError, match="3 faces found in the picture for 4 identities"):
        assign_by_order(three, 4, "largest")
    with pytest.raises(ValueError, match="1 face found in the picture for 2 identities"):
        assign_by_similarity(np.ones((1, 4)), np.ones((2, 4)))


def test_heads_are_exclusive_and_each_face_owns_its_centre(three: list[Face], make_face: MakeFace) -> None:
    crowded = [*three, make_face(190, 110, 80)]
    labels = head_labels(crowded, 300, 400)
    masks = label_masks(labels, 4)
    assert masks.shape == (4, 300, 400) and masks.dtype == np.float32
    assert set(np.unique(masks)) == {0, 1} and masks.sum(axis=0).max() == 1
    for index, face in enumerate(crowded):
        x, y = (int(value) for value in face.center)
        assert labels[y, x] == index
    assert labels[299, 399] == BACKGROUND
    assert np.array_equal(masks.sum(axis=0) == 0, labels == BACKGROUND)


def test_a_head_covers_hair_and_chin_but_not_the_neighbourhood(make_face: MakeFace) -> None:
    labels = head_labels([make_face(100, 100, 100)], 300, 300)
    rows, columns = np.nonzero(labels == 0)
    assert 40 <= rows.min() < 80 and 200 < rows.max() <= 240
    assert 60 <= columns.min() < 90 and 210 < columns.max() <= 240


def test_bodies_follow_the_person_map_and_hang_below_their_face(make_face: MakeFace) -> None:
    faces = [make_face(60, 40, 40), make_face(220, 40, 40)]
    person = np.zeros((300, 320), dtype=np.float32)
    person[90:, 40:120] = 1
    person[90:, 200:280] = 0.9
    labels = body_labels(faces, person)
    assert (labels[100:, 50:110] == 0).all() and (labels[100:, 210:270] == 1).all()
    assert (labels[150:, 130:190] == BACKGROUND).all() and labels[5, 5] == BACKGROUND
    assert labels[60, 80] == 0 and labels[60, 240] == 1


def test_people_in_front_own_what_is_below_their_faces(make_face: MakeFace) -> None:
    back, front = make_face(100, 20, 30), make_face(130, 110, 40)
    labels = body_labels([back, front], np.ones((300, 300), dtype=np.float32))
    assert labels[280, 120] == 1 and labels[70, 112] == 0


def test_a_person_without_a_found_face_stays_background(make_face: MakeFace) -> None:
    labels = body_labels([make_face(20, 20, 20)], np.ones((100, 400), dtype=np.float32))
    assert (labels[:, 200:] == BACKGROUND).all() and (labels[60:, 20:40] == 0).all()


def test_a_real_segmentation_finds_the_real_body(assets: Path, scrfd_encoder: FaceEncoder) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    image = data.astronaut()
    segmenter = open_segmenter(assets / "models" / "selfie_segmentation_landscape.onnx")
    faces = find_faces(image, scrfd_encoder).faces
    labels = body_labels(faces, person_map(image, faces, segmenter))
    assert (labels[250:450, 150:300] == 0).mean() > 0.95
    assert (labels[:200, 320:] == 0).mean() < 0.02


def test_a_model_that_is_no_segmenter_is_refused(assets: Path, roots: list[Path]) -> None:
    recogniser = roots[0] / "models" / "test_pack" / "mobilefacenet_ms1m_128d.onnx"
    with pytest.raises(ValueError, match="wanted is a segmentation model with one map"):
        open_segmenter(recogniser)(np.zeros((64, 64, 3), dtype=np.uint8))
    text = assets / "README.md"
    with pytest.raises(ValueError, match="not an ONNX model"):
        open_segmenter(text)


def test_the_preview_marks_the_used_face_and_leaves_the_rest_alone(three: list[Face]) -> None:
    image = np.full((300, 420, 3), 40, dtype=np.uint8)
    drawn = draw_faces(image, three, [2, 1, 0], 1)
    assert drawn.shape == image.shape and (image == 40).all()
    assert tuple(drawn[189, 195]) == USED and tuple(drawn[209, 65]) == OTHER
    changed = (drawn != 40).any(axis=2)
    assert not changed[240:].any() and not changed[:, 390:].any()
    assert not changed[130:170, 170:220].any()


def test_numbers_in_the_preview_follow_the_order(three: list[Face]) -> None:
    image = np.full((300, 420, 3), 40, dtype=np.uint8)
    one, other = draw_faces(image, three, [0, 1, 2], None), draw_faces(image, three, [2, 1, 0], None)
    same = (one == other).all(axis=2)
    assert not same[120:160, 40:75].all() and not same[:30, 320:360].all()
    assert same[60:100, 150:200].all()


def test_faces_over_the_border_are_drawn_inside(make_face: MakeFace) -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    drawn = draw_faces(image, [make_face(-20, -20, 200), make_face(60, 60, 90)], [0, 1], 0)
    assert tuple(drawn[0, 63]) == USED
