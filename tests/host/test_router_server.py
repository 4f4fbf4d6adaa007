"""The router on the real server: masks that do not have the picture's size, and chains that are not finished."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import LiveServer, PromptError
from PIL import Image
from stand_ins import fusion_inputs, put_photos
from workflow_forms import Api, with_inputs

EXAMPLE = Path(__file__).resolve().parents[2] / "example_workflows" / "api" / "three_people.json"
LAST, PREVIEW, PATCH = "42", "14", "10"


@pytest.fixture(scope="module")
def three_people(server: LiveServer, small_models: Any, assets: Path) -> Api:
    """The example on small models; masks of 768 x 512 meet a picture of 192 x 128."""
    put_photos(server, assets, {"person_a": "syn01", "person_b": "syn02", "person_c": "syn03"})
    inputs = fusion_inputs(server, small_models, assets, side=128)
    return with_inputs(json.loads(EXAMPLE.read_text(encoding="utf-8")), inputs)


def without_masks(workflow: Api) -> Api:
    open_chain = copy.deepcopy(workflow)
    for entry in open_chain.values():
        if entry["class_type"] == "MultiIDMaskRouter":
            del entry["inputs"]["mask"]
    return open_chain


def picture(server: LiveServer, outputs: dict[str, Any], node: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(outputs[node]["images"][0]))))


def test_an_unfinished_chain_is_refused_by_name_before_sampling(server: LiveServer, three_people: Api) -> None:
    waiting = r"waiting: person 1 \(A\), person 2 \(B\), person 3 \(C\)\. Connect a mask"
    with pytest.raises(PromptError, match=rf"FusedIDAttentionPatch: .*FusedIDAttentionPatch: .*{waiting}"):
        server.queue(without_masks(three_people))


def test_masks_of_an_unfinished_chain_are_a_message_and_no_picture(server: LiveServer, three_people: Api) -> None:
    chain = without_masks(three_people)
    kept = {key: entry for key, entry in chain.items() if entry["class_type"] in ("MultiIDMaskRouter", "FaceEmbed")}
    kept |= {key: chain[key] for key in ("8", "20", "21", "22", PREVIEW)}
    kept["90"] = {"class_type": "MaskToImage", "inputs": {"mask": [LAST, 2]}}
    kept["91"] = {"class_type": "PreviewImage", "inputs": {"images": ["90", 0]}}
    outputs = server.queue(kept)["outputs"]
    assert PREVIEW in outputs and "91" not in outputs


def test_a_content_picture_finishes_the_chain(server: LiveServer, three_people: Api, assets: Path) -> None:
    crops = [Image.open(assets / "faces" / "sfhq_crops" / f"syn0{n}.jpg").resize((200, 200)) for n in (3, 1, 2)]
    group = Image.new("RGB", (768, 512), (90, 90, 90))
    for place, crop in enumerate(crops):
        group.paste(crop, (28 + place * 256, 150))
    group.save(server.base / "input" / "group.png")
    chain = without_masks(three_people)
    chain["90"] = {"class_type": "LoadImage", "inputs": {"image": "group.png"}}
    chain[LAST]["inputs"] |= {"content": ["90", 0], "encoder": ["8", 0], "assign": "most similar"}
    chain["91"] = {"class_type": "MaskToImage", "inputs": {"mask": [LAST, 2]}}
    chain["92"] = {"class_type": "PreviewImage", "inputs": {"images": ["91", 0]}}
    outputs = server.queue(chain)["outputs"]
    masks = [np.asarray(Image.open(io.BytesIO(server.view(image)))) for image in outputs["92"]["images"]]
    middles = [float(np.nonzero(mask[..., 0] > 127)[1].mean()) for mask in masks]
    assert [int(middle // 256) for middle in middles] == [1, 2, 0]
    assert picture(server, outputs, "7").std() > 5
    assert picture(server, outputs, PREVIEW).shape == (512, 768, 3)
