"""Same people are alike, strangers are not, and every way to choose and feed a face works on real photos."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from faces.embed import SKIP, WHOLE, embed_faces, report_text
from faces.embedding import cosine, cosine_matrix
from faces.encoder import FaceEncoder
from faces.identity import Identity, mixed_embedding
from faces.mix import mix_identities
from faces.quality import QualityGate, sharpness
from faces.select import LEFT_RIGHT, MOST_SIMILAR, RIGHT_LEFT, TOP_BOTTOM

SHEET = "sfhq_sheets/SFHQ_sample_2x4.jpg"


@pytest.fixture(scope="module")
def people(scrfd_encoder: FaceEncoder, tight_portraits: dict[str, np.ndarray]) -> dict[str, Identity]:
    return {name: embed_faces([picture], scrfd_encoder).identity for name, picture in tight_portraits.items()}


def test_every_triplet_is_one_person(people: dict[str, Identity]) -> None:
    triplets = sorted({name[:5] for name in people if name.startswith("trip")})
    assert len(triplets) == 5
    for triplet in triplets:
        embeddings = [mixed_embedding(people[f"{triplet}_{rendering}"]) for rendering in "abc"]
        mean = np.mean([cosine(a, b) for a, b in itertools.combinations(embeddings, 2)])
        assert mean > 0.5, triplet


def test_strangers_are_strangers(people: dict[str, Identity]) -> None:
    embeddings = np.stack([mixed_embedding(identity) for name, identity in people.items() if name.startswith("syn")])
    similarities = cosine_matrix(embeddings, embeddings)[np.triu_indices(len(embeddings), 1)]
    assert len(similarities) == 820
    assert similarities.mean() < 0.15


def test_mixing_two_people_is_near_both_and_follows_the_weights(people: dict[str, Identity]) -> None:
    a, b = people["syn00"], people["syn10"]
    even, mostly_a = mix_identities([a, b], [1, 1]), mix_identities([a, b], [3, 1])
    assert even.cosines[0] == pytest.approx(even.cosines[1], abs=1e-5)
    assert mostly_a.cosines[0] > even.cosines[0] > mostly_a.cosines[1]
    between = cosine(mixed_embedding(a), mixed_embedding(b))
    assert even.cosines[0] == pytest.approx(np.sqrt((1 + between) / 2), abs=1e-5)


def test_one_identity_of_several_photos_is_nearer_to_a_new_photo(people: dict[str, Identity]) -> None:
    gains = []
    for triplet in ("trip0", "trip2", "trip3", "trip4", "trip5"):
        a, b, c = (people[f"{triplet}_{rendering}"] for rendering in "abc")
        both = mix_identities([a, b], [1, 1]).identity
        single = np.mean([cosine(mixed_embedding(one), mixed_embedding(c)) for one in (a, b)])
        gains.append(cosine(mixed_embedding(both), mixed_embedding(c)) - single)
    assert min(gains) > 0


def test_permuting_references_changes_nothing(
    scrfd_encoder: FaceEncoder, tight_portraits: dict[str, np.ndarray]
) -> None:
    pictures = [tight_portraits[f"trip0_{rendering}"] for rendering in "abc"]
    weights = [1.0, 2.0, 0.5]
    straight = mixed_embedding(embed_faces(pictures, scrfd_encoder, weights=weights).identity)
    for order in itertools.permutations(range(3)):
        turned = embed_faces([pictures[i] for i in order], scrfd_encoder, weights=[weights[i] for i in order])
        assert np.allclose(mixed_embedding(turned.identity), straight, atol=1e-4)


def test_one_three_and_four_channels(scrfd_encoder: FaceEncoder, tight_portraits: dict[str, np.ndarray]) -> None:
    picture = tight_portraits["syn03"]
    plain = embed_faces([picture], scrfd_encoder).identity.references[0].embedding
    opaque = np.concatenate([picture, np.full((*picture.shape[:2], 1), 255, dtype=np.uint8)], axis=2)
    grey = picture.mean(axis=2, keepdims=True).astype(np.uint8)
    four = embed_faces([opaque], scrfd_encoder).identity.references[0].embedding
    as_float = embed_faces([picture.astype(np.float32) / 255], scrfd_encoder).identity.references[0].embedding
    one = embed_faces([grey, grey[:, :, 0]], scrfd_encoder).identity.references
    assert np.array_equal(plain, four) and np.array_equal(plain, as_float)
    assert np.array_equal(one[0].embedding, one[1].embedding)
    assert cosine(plain, one[0].embedding) > 0.8


def test_choosing_by_place_on_a_sheet(scrfd_encoder: FaceEncoder, load: Callable[[str], np.ndarray]) -> None:
    sheet = load(SHEET)
    height, width = sheet.shape[:2]

    def centre(which: str, index: int) -> tuple[float, float]:
        report = embed_faces([sheet], scrfd_encoder, which=which, index=index).reports[0]
        return report.detections.faces[report.chosen].center

    assert centre(LEFT_RIGHT, 1)[0] < width / 4 and centre(LEFT_RIGHT, 8)[0] > width * 3 / 4
    assert centre(RIGHT_LEFT, 1) == centre(LEFT_RIGHT, 8)
    assert centre(TOP_BOTTOM, 1)[1] < height / 2 < centre(TOP_BOTTOM, 8)[1]


def test_most_similar_finds_each_person_on_the_sheet(
    scrfd_encoder: FaceEncoder, load: Callable[[str], np.ndarray]
) -> None:
    sheet = load(SHEET)
    for number in range(1, 9):
        wanted = embed_faces([sheet], scrfd_encoder, which=LEFT_RIGHT, index=number)
        like = wanted.identity
        # Smaller and softer, so that it is not the same picture.
        again = np.asarray(Image.fromarray(sheet).resize((sheet.shape[1] // 2, sheet.shape[0] // 2)))
        found = embed_faces([again], scrfd_encoder, which=MOST_SIMILAR, like=like)
        face = found.reports[0].detections.faces[found.reports[0].chosen]
        expected = wanted.reports[0].detections.faces[wanted.reports[0].chosen]
        assert np.allclose(np.array(face.center) * 2, expected.center, atol=20)


def test_policies_for_a_picture_without_a_face(
    scrfd_encoder: FaceEncoder, tight_portraits: dict[str, np.ndarray]
) -> None:
    face, empty = tight_portraits["syn00"], np.zeros((200, 300, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="picture 2: no face found"):
        embed_faces([face, empty], scrfd_encoder)
    skipped = embed_faces([face, empty], scrfd_encoder, policy=SKIP, weights=[2.0, 9.0])
    assert [r.weight for r in skipped.identity.references] == [2.0]
    assert [r.used for r in skipped.reports] == [True, False]
    whole = embed_faces([face, empty], scrfd_encoder, policy=WHOLE).identity.references[1]
    assert whole.embedding is None and whole.keypoints is None and whole.crop.shape == (300, 300, 3)
    with pytest.raises(ValueError, match="no picture has a usable face"):
        embed_faces([empty], scrfd_encoder, policy=SKIP)
    only_whole = embed_faces([empty], scrfd_encoder, policy=WHOLE).identity
    with pytest.raises(ValueError, match="no face embedding"):
        mixed_embedding(only_whole)


def test_the_quality_gate_refuses_blurred_small_and_doubtful_faces(
    scrfd_encoder: FaceEncoder, tight_portraits: dict[str, np.ndarray]
) -> None:
    picture = tight_portraits["syn00"]
    tiny = np.asarray(Image.fromarray(picture).resize((48, 48)))
    for image, gate, reason in (
        (tiny, QualityGate(min_size=64), "px small, wanted are 64 px"),
        (picture, QualityGate(min_sharpness=1e6), "sharpness"),
        (picture, QualityGate(min_score=0.99), "score is 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            embed_faces([image], scrfd_encoder, gate=gate)
    passed = embed_faces([picture, tiny], scrfd_encoder, gate=QualityGate(min_size=64), policy=WHOLE)
    assert [report.used for report in passed.reports] == [True, False]
    aligned = passed.identity.references[0].aligned
    blurred = np.asarray(Image.fromarray(aligned).resize((14, 14)).resize((112, 112)))
    assert sharpness(blurred) < sharpness(aligned) / 5


def test_the_report_says_encoder_licence_and_each_picture(
    scrfd_encoder: FaceEncoder, tight_portraits: dict[str, np.ndarray]
) -> None:
    embedded = embed_faces(
        [tight_portraits["syn00"], np.zeros((64, 64, 3), dtype=np.uint8)], scrfd_encoder, policy=SKIP
    )
    lines = report_text(embedded, scrfd_encoder.provider).splitlines()
    assert lines[0].startswith("1 reference, encoder test_pack (insightface, 128 numbers, ")
    assert lines[0].endswith("on CPU")
    assert "licence" in lines[1]
    assert lines[2].startswith("picture 1: 1 face (seen at") and "used number 1:" in lines[2]
    assert lines[3].startswith("picture 2: 0 faces, skipped: no face found after")


def test_yunet_without_sface_finds_but_says_which_file_is_missing(yunet_encoder: FaceEncoder) -> None:
    assert yunet_encoder.fingerprint.dim == 0
    with pytest.raises(ValueError, match=r"no face_recognition_sface_\*\.onnx beside .*yunet"):
        embed_faces([np.zeros((64, 64, 3), dtype=np.uint8)], yunet_encoder)


def test_keypoints_of_a_reference_lie_in_its_crop(
    scrfd_encoder: FaceEncoder, load: Callable[[str], np.ndarray]
) -> None:
    """Seen again in the crop alone, the face has its points where the reference says."""
    for name in ("group/solvay_conference_1927.png", "sfhq_crops/syn00.jpg", "congress_gpo_225x275/A000014.jpg"):
        reference = embed_faces([load(name)], scrfd_encoder).identity.references[0]
        again = embed_faces([reference.crop], scrfd_encoder).reports[0]
        side = reference.crop.shape[0]
        found = again.detections.faces[again.chosen].keypoints
        assert np.abs(found - reference.keypoints).mean() < 0.03 * side, name
