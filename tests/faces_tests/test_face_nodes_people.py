"""Several people in the real ComfyUI: mixing, comparing, foreign encoders, and the whole chain through the server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

Run = Callable[..., tuple[Any, ...]]


def test_another_encoder_s_identity_is_refused_by_both_names(
    to_image: Any, run: Run, pack: Any, embed: Any, encoder: Any, tight_portraits: dict[str, np.ndarray]
) -> None:
    mine = embed(tight_portraits["syn05"])[0]
    theirs = replace(mine, encoder=replace(mine.encoder, name="antelopev2", recogniser_sha256="f" * 64))
    file = run("FusedIDSaveIdentity", identity=theirs, name="foreign", if_exists="overwrite")[1]
    both = r"antelopev2 .*test_pack|test_pack .*antelopev2"
    with pytest.raises(ValueError, match=rf"^FusedIDLoadIdentity: .*({both})"):
        run("FusedIDLoadIdentity", identity_file=file, encoder=encoder)
    with pytest.raises(ValueError, match=rf"^FusedIDMix: .*({both})"):
        run("FusedIDMix", name="", identity_1=mine, identity_2=theirs)
    with pytest.raises(ValueError, match=rf"^FusedIDFaceSimilarity: .*({both})"):
        compared = to_image(tight_portraits["syn05"])
        run("FusedIDFaceSimilarity", encoder=encoder, image=compared, min_similarity=-1.0, identity_1=theirs)
    with pytest.raises(ValueError, match=rf"^FaceEmbed: .*({both})"):
        embed(tight_portraits["syn05"], similar_to=theirs, face="most similar")


def test_mixing_reports_the_cosine_to_each_parent(run: Run, embed: Any, tight_portraits: dict[str, np.ndarray]) -> None:
    a, b = embed(tight_portraits["syn00"], name="Ada")[0], embed(tight_portraits["syn10"])[0]
    mix, report = run("FusedIDMix", name="mix", identity_1=a, weight_1=3.0, identity_4=b, weight_4=1.0, weight_2=9.0)
    assert mix.name == "mix" and len(mix.references) == 2
    assert report.splitlines()[0].startswith("Ada: 75% of the mix, cosine 0.9")
    assert report.splitlines()[1].startswith("identity 2: 25% of the mix, cosine 0.")
    with pytest.raises(ValueError, match=r"^FusedIDMix: all weights are 0"):
        run("FusedIDMix", name="", identity_1=a, weight_1=0.0)


def test_similarity_sorts_filters_and_reports(
    to_image: Any, run: Run, embed: Any, encoder: Any, tight_portraits: dict[str, np.ndarray]
) -> None:
    wanted = embed(tight_portraits["trip0_a"], name="Trip")[0]
    portraits = [Image.fromarray(tight_portraits[name]).resize((512, 512)) for name in ("syn10", "trip0_b", "trip0_a")]
    image = to_image(*(np.asarray(portrait) for portrait in portraits), np.zeros((512, 512, 3)))
    mean, images, preview, report, table, beside = run(
        "FusedIDFaceSimilarity", encoder=encoder, image=image, min_similarity=0.5, identity_1=wanted
    )
    assert torch.equal(images, image[[2, 1]])
    assert preview.shape == image.shape and torch.equal(preview[3], image[3])
    rows = [line.split(",") for line in table.splitlines()]
    assert rows[0] == ["picture", "identity", "found", "cosine"]
    assert [row[2] for row in rows[1:]] == ["1", "1", "1", "0"]
    assert float(rows[3][3]) == pytest.approx(1, abs=0.03) and rows[4][3] == "0.0000"
    assert mean == pytest.approx(np.mean([float(row[3]) for row in rows[1:]]), abs=1e-3)
    assert "picture 4 (0 faces): Trip not found" in report
    assert beside.shape[0] == 4 and beside.shape[2] > 512 and not torch.equal(beside[0], beside[3])
    never = run("FusedIDFaceSimilarity", encoder=encoder, image=image[:1], min_similarity=1.0, identity_1=wanted)[1]
    assert torch.equal(never, image[:1])


def test_similarity_assigns_several_people_on_one_picture(
    to_image: Any, run: Run, pack: Any, embed: Any, encoder: Any, load: Callable[[str], np.ndarray]
) -> None:
    sheet = load("sfhq_sheets/SFHQ_sample_2x4.jpg")
    people = {
        f"identity_{n}": embed(sheet, face="left to right", number=place)[0] for n, place in ((1, 6), (2, 1), (3, 4))
    }
    mean, _, _, report, _, beside = run(
        "FusedIDFaceSimilarity", encoder=encoder, image=to_image(sheet), min_similarity=-1.0, **people
    )
    assert mean == pytest.approx(1, abs=1e-4)
    assert "picture 1 (8 faces): identity 1 1.000, identity 2 1.000, identity 3 1.000" in report
    drawn = (beside[0] * 255).round().to(torch.uint8).numpy()
    column = drawn.shape[1] - round(sheet.shape[1] * min(1, 1536 / max(sheet.shape[:2])))
    for colour in pack.submodule("nodes.labels").COLOURS[:3]:
        columns = np.nonzero((drawn == np.array(colour)).all(-1))[1]
        assert (columns < column).sum() > 500 and (columns > column).sum() > 500, "at the reference and at the face"


@pytest.mark.parametrize("side", [96, 512, 2000])
def test_scores_can_be_read_beside_pictures_of_any_size(
    to_image: Any, run: Run, pack: Any, embed: Any, encoder: Any, tight_portraits: dict[str, np.ndarray], side: int
) -> None:
    wanted = embed(tight_portraits["trip0_a"], name="Trip")[0]
    pictures = [Image.fromarray(tight_portraits[name]).resize((side, side)) for name in ("trip0_a", "syn10")]
    given = {"encoder": encoder, "min_similarity": -1.0, "identity_1": wanted}
    *_, beside = run("FusedIDFaceSimilarity", image=to_image(*(np.asarray(one) for one in pictures)), **given)
    drawn = (beside * 255).round().to(torch.uint8).numpy()
    height = min(max(side, 512), 1536)
    assert drawn.shape[1] == height and drawn.shape[2] > 1.3 * height
    tile = drawn.shape[2] - height
    reference = np.asarray(Image.fromarray(wanted.references[0].crop).resize((tile, tile)))
    assert np.abs(drawn[0, :tile, :tile].astype(float) - reference).mean() < 6
    label = (drawn[0, tile:, :tile] == np.array(pack.submodule("nodes.labels").COLOURS[0])).all(-1)
    assert np.flatnonzero(label.any(1)).size >= 20, "the writing is 16 pixels high at least"
    alike, stranger = (drawn[n, tile : tile + 60, :tile] for n in (0, 1))
    assert not np.array_equal(alike, stranger), "another score is written"


def test_the_whole_chain_through_the_server(
    embed_defaults: dict[str, Any], server: Any, face_models: Path, assets: Path, tight_portraits: dict[str, np.ndarray]
) -> None:
    photo = server.upload_image(assets / "faces" / "sfhq_crops" / "syn00.jpg", name="fusedid_syn00.jpg")
    loader = {"face_pack": "test_pack (licence unknown, ask its author)", "provider": "auto", "det_size": 640}
    prompt = {
        "1": {"class_type": "LoadIdentityEncoder", "inputs": loader},
        "2": {"class_type": "LoadImage", "inputs": {"image": photo}},
        "3": {"class_type": "FaceEmbed", "inputs": {"encoder": ["1", 0], "image": ["2", 0], **embed_defaults}},
        "4": {
            "class_type": "FusedIDSaveIdentity",
            "inputs": {"identity": ["3", 0], "name": "from server", "if_exists": "overwrite"},
        },
        "5": {"class_type": "FusedIDMix", "inputs": {"identity_1": ["4", 0], "weight_1": 1.0, "name": "mix"}},
        "6": {
            "class_type": "FusedIDFaceSimilarity",
            "inputs": {"encoder": ["1", 0], "image": ["2", 0], "identity_1": ["5", 0], "min_similarity": -1.0},
        },
        "7": {"class_type": "SaveImage", "inputs": {"images": ["3", 1], "filename_prefix": "faces"}},
    }
    for number in range(2, 7):
        prompt["5"]["inputs"][f"weight_{number}"] = 1.0
    outputs = server.queue(prompt)["outputs"]
    assert outputs["4"]["text"] == ["saved as from server.safetensors"]
    assert outputs["6"]["text"][0].startswith("mean similarity 1.000 over 1 picture")
    assert len(server.view(outputs["7"]["images"][0])) > 10_000
    saved = "from server.safetensors"
    assert saved in server.object_info("FusedIDLoadIdentity")["input"]["required"]["identity_file"][1]["options"]
    prompt = {
        "1": {"class_type": "FusedIDLoadIdentity", "inputs": {"identity_file": saved}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}},
    }
    assert server.queue(prompt)["outputs"]["2"]["text"][0].startswith("from server: 1 reference")
