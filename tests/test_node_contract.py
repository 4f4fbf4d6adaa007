"""Node ids, inputs and their order are a promise: workflows that people saved load and run for ever.

After appending an input or adding a node: `python dev.py contract --comfyui PATH`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from locale_words import own_schemas
from node_contract import PINNED, broken, contract_of, pinned
from stand_ins import fusion_inputs, put_photos
from workflow_forms import api_from_ui, faults, with_inputs

OLD = PINNED.parent / "old_workflows"
API_FORMS = sorted(OLD.glob("*/api/*.json"))
UI_FORMS = sorted(OLD.glob("*/ui/*.json"))


def name_of(path: Path) -> str:
    return f"{path.parents[1].name}-{path.stem}"


def test_nothing_that_was_promised_has_changed(server):
    now = {name: contract_of(schema) for name, schema in own_schemas(server.object_info()).items()}
    assert broken(pinned(), now) == []


def test_everything_new_is_promised_too(server):
    now = {name: contract_of(schema) for name, schema in own_schemas(server.object_info()).items()}
    assert now.keys() == pinned().keys(), "run: python dev.py contract --comfyui PATH"
    for name, contract in now.items():
        assert [entry["name"] for entry in contract["inputs"]] == [entry["name"] for entry in pinned()[name]["inputs"]]


@pytest.mark.parametrize("path", API_FORMS, ids=name_of)
def test_old_api_workflow_is_still_accepted(path, server):
    assert faults(json.loads(path.read_text(encoding="utf-8")), server.object_info()) == []


@pytest.mark.parametrize("path", UI_FORMS, ids=name_of)
def test_old_ui_workflow_still_means_the_same(path, server):
    schemas = server.object_info()
    ui = api_from_ui(json.loads(path.read_text(encoding="utf-8")), schemas)
    api = json.loads((path.parents[1] / "api" / path.name).read_text(encoding="utf-8"))
    ours = own_schemas(schemas)
    for key, entry in api.items():
        if entry["class_type"] in ours:
            assert {name: ui[key]["inputs"].get(name) for name in entry["inputs"]} == entry["inputs"]


def test_an_old_workflow_still_runs(server, small_models, assets):
    (path,) = [path for path in API_FORMS if path.match("0.1.0/api/one_person.json")]
    put_photos(server, assets, {"person": "syn00"})
    workflow = json.loads(path.read_text(encoding="utf-8"))
    inputs = fusion_inputs(server, small_models, assets, side=64)
    assert server.queue(with_inputs(workflow, inputs | {"KSampler": {"steps": 1}}))["status"]["completed"]


# ----------------------------------------------------------------------------------------------------------------------
# The comparison itself


OLD_NODE = {
    "Node": {
        "inputs": [
            {"name": "image", "type": "IMAGE", "required": True},
            {"name": "mode", "type": "COMBO", "required": False, "default": "a", "choices": ["a", "b"]},
            {"name": "size", "type": "INT", "required": False, "default": 3, "range": [0, 9]},
        ],
        "outputs": [["image", "IMAGE"]],
    }
}


def test_additions_at_the_end_are_allowed():
    new = copy.deepcopy(OLD_NODE)
    new["Node"]["inputs"][1]["choices"].append("c")
    new["Node"]["inputs"][2]["range"] = [-1, 99]
    new["Node"]["inputs"].append({"name": "more", "type": "INT", "required": False, "default": 0, "range": [0, 1]})
    new["Node"]["outputs"].append(["mask", "MASK"])
    assert broken(OLD_NODE, new | {"Other": new["Node"]}) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda node: node["inputs"].pop(0), "inputs were"),
        (lambda node: node["inputs"].reverse(), "inputs were"),
        (lambda node: node["inputs"][1].update(default="b"), "default was 'a'"),
        (lambda node: node["inputs"][1]["choices"].pop(), "lost the choices ['b']"),
        (lambda node: node["inputs"][2].update(range=[0, 8]), "range was [0, 9]"),
        (lambda node: node["inputs"][0].update(type="MASK"), "type was 'IMAGE'"),
        (lambda node: node["inputs"][1].update(required=True), "was optional"),
        (lambda node: node["inputs"].append({"name": "x", "type": "INT", "required": True}), "new input x is required"),
        (lambda node: node.update(outputs=[["mask", "MASK"]]), "outputs were"),
    ],
)
def test_everything_else_is_found(change, problem):
    new = copy.deepcopy(OLD_NODE)
    change(new["Node"])
    (found,) = broken(OLD_NODE, new)
    assert problem in found
    assert broken(OLD_NODE, {}) == ["node Node is gone"]
