"""Every example workflow: its two forms agree, fit the real server's schemas, and run."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from demo import choose_pack, link
from PIL import Image
from workflow_forms import api_from_ui, completed, faults, with_inputs

EXAMPLES = Path(__file__).resolve().parents[1] / "example_workflows"
FUSION = ("one_person", "three_people")  # the guidance examples run in tests/host/test_guidance_workflows.py
PHOTOS = {"person": "syn00", "person_a": "syn01", "person_b": "syn02", "person_c": "syn03"}
SIDE = 128
NAMES = sorted(path.stem for path in (EXAMPLES / "api").glob("*.json"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def api_form(name: str) -> dict:
    return read(EXAMPLES / "api" / f"{name}.json")


def test_the_examples_are_complete():
    assert set(FUSION) <= set(NAMES)
    assert sorted(path.stem for path in EXAMPLES.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_machine_is_named(name):
    for form in (EXAMPLES / f"{name}.json", EXAMPLES / "api" / f"{name}.json"):
        assert not re.search(r"[A-Za-z]:\\\\|/(home|root|work|tmp|Users)/", form.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_sampler_is_used(name):
    samplers = [node["inputs"] for node in api_form(name).values() if node["class_type"] == "KSampler"]
    assert samplers
    assert {(inputs["sampler_name"], inputs["steps"]) for inputs in samplers} == {("euler_ancestral", 25)}


@pytest.mark.parametrize("name", NAMES)
def test_nodes_inputs_and_links_exist(name, server):
    assert faults(api_form(name), server.object_info()) == []


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_workflow(name, server):
    schemas = server.object_info()
    api = completed(api_form(name), schemas)
    wanted = {key: {"class_type": entry["class_type"], "inputs": entry["inputs"]} for key, entry in api.items()}
    assert api_from_ui(read(EXAMPLES / f"{name}.json"), schemas) == wanted


@pytest.fixture(scope="module")
def stand_ins(server, small_models, assets) -> dict[str, dict]:
    """Files of this machine for every example: small random models, synthetic faces, the test pack."""
    pack = server.base / "models" / "insightface" / "models" / "test_pack"
    if not pack.exists():
        link(assets / "insightface" / "models" / "test_pack", pack)
    for name, photo in PHOTOS.items():
        Image.open(assets / "faces" / "sfhq_crops" / f"{photo}.jpg").save(server.base / "input" / f"{name}.png")
    return {
        "CheckpointLoaderSimple": {"ckpt_name": small_models.checkpoint("sd15_full").name},
        "LoadIdentityEncoder": {"face_pack": choose_pack(server, "test_pack")},
        "FusedIDAttentionPatch": {"adapter": small_models.adapter("sd15_full").name},
        "EmptyLatentImage": {"width": SIDE, "height": SIDE},
        "KSampler": {"steps": 2},
    }


@pytest.mark.parametrize("name", FUSION)
def test_example_makes_a_picture_on_the_real_server(name, server, stand_ins):
    workflow = with_inputs(api_form(name), stand_ins)
    outputs = server.queue(workflow)["outputs"]
    kinds = {workflow[key]["class_type"]: output for key, output in outputs.items()}
    picture = np.asarray(Image.open(io.BytesIO(server.view(kinds["SaveImage"]["images"][0]))))
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture.std() > 5
    assert "16 of 16" in kinds["PreviewAny"]["text"][0]
