"""MultiIDMaskRouter with a content picture: real people are found, assigned and masked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import router_lab as lab
import torch
from PIL import Image
from torch import Tensor

REFUSED = r"^MultiIDMaskRouter: "
SHEET_FACES = 8
PORTRAITS = ("syn05", "trip0_b", "trip2_b", "trip3_b", "trip4_b")


@pytest.fixture(scope="module")
def encoder(pack: Any, assets: Path) -> Any:
    return lab.encoder(pack, assets)


@pytest.fixture(scope="module")
def solvay(assets: Path) -> Tensor:
    return lab.read_image(assets / "faces" / "group" / "solvay_conference_1927.png")


@pytest.fixture(scope="module")
def sheet(assets: Path) -> Tensor:
    """Eight synthetic people in two rows of four, made smaller: 1832 x 976."""
    picture = lab.read_image(assets / "faces" / "sfhq_sheets" / "SFHQ_sample_2x4.jpg")
    return picture[:, ::2, ::2].contiguous()


@pytest.fixture(scope="module")
def row_of_portraits(assets: Path) -> Tensor:
    """Five people side by side, 300 pixels each: a stranger, then one picture of four people we know others of."""
    crops = [Image.open(assets / "faces" / "sfhq_crops" / f"{name}.jpg").convert("RGB") for name in PORTRAITS]
    row = np.concatenate(
        [np.pad(np.asarray(crop.resize((260, 260))), ((60, 60), (20, 20), (0, 0))) for crop in crops], 1
    )
    return torch.from_numpy(row.astype(np.float32) / 255)[None]


@pytest.fixture(scope="module")
def people(pack: Any) -> list[Any]:
    return [lab.person(pack, f"P{number}") for number in range(1, 30)]


def centres(pack: Any, picture: Tensor, encoder: Any, masks: Tensor) -> list[tuple[float, float, list[int]]]:
    """(x, y, people who own it) of every face's centre."""
    faces = lab.faces_of(pack, picture, encoder)
    return [
        (*face.center, owners) for face, owners in zip(faces, lab.owners_of_centres(masks, picture, faces), strict=True)
    ]


def test_all_29_people_of_a_group_get_their_own_head_from_left_to_right(pack, encoder, solvay, people):
    routed, preview, masks = lab.chain(pack, people, last={"content": solvay, "encoder": encoder})
    found = centres(pack, solvay, encoder, masks)
    assert len(found) == 29 and all(len(owners) == 1 for *_, owners in found)
    assert [owners[0] for *_, owners in sorted(found)] == list(range(29))
    assert float(masks.sum(0).max()) == 1.0 and set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(routed.masks, masks)
    assert max(preview.shape[1:3]) == 1536


@pytest.mark.parametrize(
    ("assign", "key"),
    [
        ("left to right", lambda face: face.center[0]),
        ("right to left", lambda face: -face.center[0]),
        ("top to bottom", lambda face: face.center[1]),
        ("largest first", lambda face: -face.area),
    ],
)
def test_everybody_is_assigned_by_the_chosen_order(pack, encoder, sheet, people, assign, key):
    last = {"content": sheet, "encoder": encoder, "assign": assign}
    masks = lab.chain(pack, people[:SHEET_FACES], last=last)[2]
    faces = sorted(lab.faces_of(pack, sheet, encoder), key=key)
    assert lab.owners_of_centres(masks, sheet, faces) == [[number] for number in range(SHEET_FACES)]


def test_more_people_than_identities_stay_background_and_are_framed(pack, encoder, sheet, people):
    _, preview, masks = lab.chain(pack, people[:3], last={"content": sheet, "encoder": encoder})
    faces = lab.faces_of(pack, sheet, encoder)
    largest = sorted(faces, key=lambda face: -face.area)[:3]
    for face, owners in zip(faces, lab.owners_of_centres(masks, sheet, faces), strict=True):
        assert owners == ([sorted(largest, key=lambda f: f.center[0]).index(face)] if face in largest else [])
    orange = pack.submodule("faces.preview").OTHER
    framed = (preview[0] * 255 - torch.tensor(orange)).abs().amax(-1) < 40
    scale = preview.shape[2] / sheet.shape[2]
    for face in faces:
        x0, y0, x1, _ = (round(side * scale) for side in face.box)
        edge = framed[max(0, y0 - 3) : y0 + 6, x0 + 8 : x1 - 8]
        assert (float(edge.any(0).float().mean()) > 0.9) == (face not in largest)


@pytest.fixture(scope="module")
def known(pack: Any, encoder: Any, assets: Path) -> dict[str, Any]:
    """Identities of four people, from other pictures than the ones in the row."""
    import peer_ours

    def embedded(name: str) -> Any:
        image = lab.read_image(assets / "faces" / "sfhq_crops" / f"{name}_a.jpg")
        return peer_ours.run_node(pack.nodes["FaceEmbed"], encoder=encoder, image=image, name=name)[0]

    return {name: embedded(name) for name in ("trip0", "trip2", "trip3", "trip4")}


@pytest.mark.parametrize("names", [("trip3", "trip0", "trip4"), ("trip4", "trip3", "trip2", "trip0"), ("trip2",)])
def test_likeness_finds_the_right_people_in_any_order(pack, encoder, row_of_portraits, known, names):
    last = {"content": row_of_portraits, "encoder": encoder, "assign": "most similar"}
    masks = lab.chain(pack, [known[name] for name in names], last=last)[2]
    for mask, name in zip(masks, names, strict=True):
        x = float(mask.sum(0).nonzero().float().mean())
        assert int(x / 300) == PORTRAITS.index(f"{name}_b"), name
    faces = lab.faces_of(pack, row_of_portraits, encoder)
    assert sum(bool(owners) for owners in lab.owners_of_centres(masks, row_of_portraits, faces)) == len(names)


def test_the_same_person_twice_gets_the_face_that_is_left_too(pack, encoder, row_of_portraits, known):
    people = [*known.values(), replace(known["trip2"], name="again")]
    last = {"content": row_of_portraits, "encoder": encoder, "assign": "most similar"}
    masks = lab.chain(pack, people, last=last)[2]
    faces = lab.faces_of(pack, row_of_portraits, encoder)
    assert sorted(lab.owners_of_centres(masks, row_of_portraits, faces)) == [[number] for number in range(5)]


def test_too_few_faces_are_refused_with_both_numbers(pack, encoder, row_of_portraits, people):
    last = {"content": row_of_portraits, "encoder": encoder}
    with pytest.raises(ValueError, match=REFUSED + "5 faces found in the picture for 7 identities.*det_size.*masks"):
        lab.chain(pack, people[:7], last=last)
    with pytest.raises(ValueError, match=REFUSED + "5 faces found in the picture for 7 identities"):
        lab.chain(pack, people[:7], last={**last, "assign": "most similar"})
    noise = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=REFUSED + "0 faces found in the picture for 1 identity"):
        lab.chain(pack, people[:1], last={**last, "content": noise})


def test_content_without_an_encoder_or_with_another_one_is_refused(pack, encoder, row_of_portraits, people):
    with pytest.raises(ValueError, match=REFUSED + "'content' needs 'encoder'"):
        lab.chain(pack, people[:2], last={"content": row_of_portraits})
    with pytest.raises(ValueError, match=REFUSED + "the identity P1 was made with the face encoder made up.*test_pack"):
        lab.chain(pack, people[:2], last={"content": row_of_portraits, "encoder": encoder, "assign": "most similar"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.zeros(2, 64, 64, 3), "'content' holds 2 pictures"),
        (torch.full((1, 64, 64, 3), float("nan")), "NaN"),
        (torch.zeros(1, 1, 1, 3), "1 x 1 pixels"),
        (torch.zeros(0, 64, 64, 3), "empty batch"),
    ],
)
def test_unusable_content_is_refused(pack, encoder, people, content, reason):
    with pytest.raises(ValueError, match=REFUSED + ".*" + reason):
        lab.chain(pack, people[:2], last={"content": content, "encoder": encoder})


def test_painted_masks_stay_and_the_others_get_the_faces_that_are_left(pack, encoder, row_of_portraits, people):
    painted = torch.zeros(1, 190, 750)  # half the picture's size
    painted[:, :, 300:450] = 1  # the third portrait
    last = {"content": row_of_portraits, "encoder": encoder}
    masks = lab.chain(pack, people[:5], [None, painted, None, None, None], last=last)[2]
    found = sorted(centres(pack, row_of_portraits, encoder, masks))
    assert [owners for *_, owners in found] == [[0], [2], [1], [3], [4]]
    assert float(masks[1, :, 620:880].mean()) == 1.0 and float(masks[1, :, :590].max()) == 0.0


def test_the_last_content_decides_for_everybody_without_a_painted_mask(pack, encoder, row_of_portraits, sheet, people):
    last = {"content": row_of_portraits, "encoder": encoder}
    once = lab.chain(pack, people[:4], last=last)
    everywhere = lab.chain(pack, people[:4], each={"content": sheet, "encoder": encoder}, last=last)
    assert torch.equal(once[2], everywhere[2]) and torch.equal(once[1], everywhere[1])


def test_found_places_travel_on_to_a_person_with_a_painted_mask(pack, encoder, row_of_portraits, people):
    routed, _, before = lab.chain(pack, people[:2], last={"content": row_of_portraits, "encoder": encoder})
    painted = 1 - before.sum(0, keepdim=True)
    masks = lab.route(pack, people[2], mask=painted, routed=routed)[2]
    assert torch.equal(masks, torch.cat([before, painted]))


def test_content_under_painted_masks_is_only_the_preview_s_ground(pack, row_of_portraits, people):
    masks = lab.columns(2, (380, 1500))
    plain, shown = (
        lab.chain(pack, people[:2], masks),
        lab.chain(pack, people[:2], masks, last={"content": row_of_portraits}),
    )
    assert torch.equal(plain[2], shown[2]) and not torch.equal(plain[1], shown[1])
    with pytest.raises(ValueError, match=REFUSED + "'content' is 1500 x 380, a mask 96 x 64"):
        lab.chain(pack, people[:2], lab.columns(2), last={"content": row_of_portraits})


@pytest.fixture
def segmentation_folder(pack: Any) -> Iterator[Path]:
    folder = pack.host.base / "models" / "fusedid" / "segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    for file in folder.iterdir():
        file.unlink()


def test_bodies_without_a_model_name_the_file_and_its_folder(
    pack, encoder, row_of_portraits, people, segmentation_folder
):
    reason = rf"{REFUSED}.*no \.onnx file in {segmentation_folder}.*selfie_segmentation_landscape\.onnx.*'head'"
    with pytest.raises(ValueError, match=reason):
        lab.chain(pack, people[:2], last={"content": row_of_portraits, "encoder": encoder, "region": "body"})


def test_bodies_hang_below_the_heads(pack, encoder, people, assets, segmentation_folder):
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    model = assets / "models" / "selfie_segmentation_landscape.onnx"
    (segmentation_folder / "person.onnx").write_bytes(model.read_bytes())
    content = torch.from_numpy(data.astronaut().astype(np.float32) / 255)[None]
    last = {"content": content, "encoder": encoder}
    head, body = (lab.chain(pack, people[:1], last={**last, "region": one})[2][0] for one in ("head", "body"))
    assert float(head[250:450].max()) == 0.0 and float(body[250:450, 150:300].mean()) > 0.95
    assert (body >= head).all() and float(body[:200, 320:].mean()) < 0.02
    (segmentation_folder / "second.onnx").write_bytes(b"no model")
    with pytest.raises(
        ValueError, match=REFUSED + r"2 person segmentation models.*person\.onnx, second\.onnx.*only one"
    ):
        lab.chain(pack, people[:1], last={**last, "region": "body"})


def test_assignment_by_likeness_does_not_depend_on_the_order_of_people(pack, encoder, row_of_portraits, known):
    """Promise 7."""
    last = {"content": row_of_portraits, "encoder": encoder, "assign": "most similar"}
    people = list(known.values())
    straight = lab.chain(pack, people, last=last)[2]
    order = random.Random(3).sample(range(4), 4)
    assert torch.equal(lab.chain(pack, [people[i] for i in order], last=last)[2], straight[order])
