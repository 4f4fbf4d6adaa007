"""The order of looks, when a search ends, what is believed, and what the cache remembers. With a stand-in encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from faces import cache
from faces.cache import clear_face_cache, embed_cached, find_faces_cached
from faces.detect import Look, distinct_faces, find_faces, looks_to_try
from faces.embed import embed_faces
from faces.encoder import Face

MakeFace = Callable[..., Face]
StandIn = Callable[..., Any]
PICTURE = np.zeros((400, 500, 3), dtype=np.uint8)


def test_looks_go_from_the_given_size_down_then_padded_then_up() -> None:
    looks = list(looks_to_try(640, 3000, 2000))
    assert looks[0] == Look(640)
    sizes = [look.size for look in looks if not look.padding]
    assert sizes == [640, 480, 320, 256, 1280]
    padded = [place for place, look in enumerate(looks) if look.padding]
    assert padded == [4, 5, 6]
    assert len(set(looks)) == len(looks)
    assert list(looks_to_try(640, 500, 600))[-1].padding > 0
    assert max(look.size for look in looks_to_try(1920, 9000, 9000)) == 1920
    assert min(look.size for look in looks_to_try(64, 90, 90)) == 128


def test_a_sure_face_ends_the_search(stand_in: StandIn, make_face: MakeFace) -> None:
    encoder = stand_in(lambda image, size: [make_face(100, 100, 80)] if size <= 480 else [])
    detections = find_faces(PICTURE, encoder)
    assert [size for _, size in encoder.looks] == [640, 480]
    assert (detections.found_by, detections.looks, len(detections.faces)) == (Look(480), 2, 1)


def test_a_doubtful_face_needs_a_second_look(stand_in: StandIn, make_face: MakeFace) -> None:
    doubtful = make_face(100, 100, 80, score=0.55)
    assert find_faces(PICTURE, stand_in(lambda image, size: [doubtful] if size == 480 else [])).faces == ()
    here_and_there = {640: [doubtful], 480: [make_face(300, 250, 80, score=0.55)]}
    assert find_faces(PICTURE, stand_in(lambda image, size: here_and_there.get(size, []))).faces == ()
    twice = {640: [doubtful], 320: [make_face(104, 98, 84, score=0.56)]}
    detections = find_faces(PICTURE, stand_in(lambda image, size: twice.get(size, [])))
    assert detections.found_by == Look(320) and len(detections.faces) == 1


def test_a_face_seen_in_the_padded_picture_comes_back_in_place(stand_in: StandIn, make_face: MakeFace) -> None:
    def seen(image: np.ndarray, size: int) -> list[Face]:
        padded = image.shape[0] > 400
        return [make_face((image.shape[1] - 500) / 2 + 100, (image.shape[0] - 400) / 2 + 50, 80)] if padded else []

    detections = find_faces(PICTURE, stand_in(seen))
    assert detections.found_by == Look(640, 1 / 3)
    assert np.allclose(detections.faces[0].box, (100, 50, 180, 130), atol=1)
    assert np.allclose(detections.faces[0].keypoints, make_face(100, 50, 80).keypoints, atol=1)


def test_large_pictures_are_shrunk_before_padding(stand_in: StandIn) -> None:
    encoder = stand_in(lambda image, size: [])
    assert find_faces(np.zeros((3000, 4000, 3), dtype=np.uint8), encoder).faces == ()
    padded = [shape for shape, _ in encoder.looks if shape[:2] != (3000, 4000)]
    assert len(padded) == 3
    assert max(max(shape) for shape in padded) <= 640 * 3


def test_faces_outside_the_picture_and_specks_are_dropped(stand_in: StandIn, make_face: MakeFace) -> None:
    faces = [make_face(-200, 10, 80), make_face(490, 390, 300), make_face(20, 20, 4), make_face(-30, -30, 80)]
    found = find_faces(PICTURE, stand_in(lambda image, size: faces), retry=False).faces
    assert [face.box[0] for face in found] == [-30]


def test_each_face_is_reported_once(make_face: MakeFace) -> None:
    best, shifted, inner = make_face(100, 100, 100), make_face(110, 105, 100, 0.8), make_face(130, 131, 40, 0.7)
    neighbour = make_face(210, 100, 100, 0.6)
    assert distinct_faces([neighbour, inner, shifted, best]) == (best, neighbour)


def test_the_same_picture_is_looked_at_once(stand_in: StandIn, make_face: MakeFace) -> None:
    encoder = stand_in(lambda image, size: [make_face(100, 100, 80)])
    first = find_faces_cached(PICTURE, encoder)
    assert find_faces_cached(PICTURE.copy(), encoder) is first
    assert len(encoder.looks) == 1
    find_faces_cached(PICTURE, encoder, det_size=320)
    find_faces_cached(PICTURE, encoder, retry=False)
    changed = PICTURE.copy()
    changed[0, 0, 0] = 1
    find_faces_cached(changed, encoder)
    find_faces_cached(PICTURE.reshape(500, 400, 3), encoder)
    assert len(encoder.looks) == 5


def test_a_picture_without_a_face_is_remembered_too(stand_in: StandIn) -> None:
    encoder = stand_in(lambda image, size: [])
    looks = find_faces_cached(PICTURE, encoder).looks
    find_faces_cached(PICTURE, encoder)
    assert len(encoder.looks) == looks > 1


def test_embeddings_are_computed_once_and_handed_out_as_copies(stand_in: StandIn) -> None:
    encoder = stand_in(lambda image, size: [])
    faces = [np.full((112, 112, 3), shade, dtype=np.uint8) for shade in (1, 2, 1)]
    first = embed_cached(faces, encoder)
    assert encoder.embedded == 2
    first[0][:] = 0
    assert embed_cached(faces[:1], encoder)[0][0] == 1
    assert encoder.embedded == 2


def test_the_faces_of_all_pictures_go_through_the_recogniser_in_one_batch(
    stand_in: StandIn, make_face: MakeFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = stand_in(lambda image, size: [make_face(40.0, 40.0, 100.0)])
    batches: list[int] = []
    embed = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda aligned: (batches.append(len(aligned)), embed(aligned))[1])
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (200, 200, 3), dtype=np.uint8) for _ in range(5)]
    together = embed_faces(pictures, encoder).identity
    assert batches == [5]
    assert embed_faces(pictures[::-1], encoder).identity.references[0].embedding is not None
    assert batches == [5], "remembered by content"
    clear_face_cache()
    alone = [embed_faces([picture], encoder).identity.references[0] for picture in pictures]
    assert all(np.array_equal(a.embedding, b.embedding) for a, b in zip(alone, together.references))


def test_another_encoder_has_its_own_entries(
    stand_in: StandIn, make_fingerprint: Callable[..., Any], make_face: MakeFace
) -> None:
    one = stand_in(lambda image, size: [make_face(100, 100, 80)])
    other = stand_in(lambda image, size: [], fingerprint=make_fingerprint(digest="b" * 64))
    other_detector = stand_in(lambda image, size: [])
    face = np.zeros((112, 112, 3), dtype=np.uint8)
    embed_cached([face], one)
    embed_cached([face], other)
    assert other.embedded == 1
    object.__setattr__(other_detector.fingerprint, "detector_sha256", "e" * 64)
    assert find_faces_cached(PICTURE, one).faces
    assert not find_faces_cached(PICTURE, other_detector).faces


def test_the_cache_is_bounded_and_forgets_the_oldest(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_ENTRIES", 3)
    encoder = stand_in(lambda image, size: [])
    faces = [np.full((112, 112, 3), shade, dtype=np.uint8) for shade in range(5)]
    for face in faces:
        embed_cached([face], encoder)
    embed_cached([faces[4]], encoder)
    assert encoder.embedded == 5
    embed_cached([faces[0]], encoder)
    assert encoder.embedded == 6
    assert cache.clear_face_cache() == 3
