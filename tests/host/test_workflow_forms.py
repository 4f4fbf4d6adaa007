"""Between a workflow's two forms, on schemas written by hand: no host is needed."""

from __future__ import annotations

import pytest
from workflow_forms import api_from_ui, completed, faults, ui_from_api, with_inputs

SCHEMAS = {
    "Load": {
        "input": {"required": {"image": [["a.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"],
        "output_name": ["image", "mask"],
    },
    "Blend": {
        "input": {
            "required": {
                "first": ["IMAGE"],
                "seed": ["INT", {"default": 0, "min": 0, "max": 9, "control_after_generate": True}],
                "mode": ["COMBO", {"options": ["add", "mix"], "default": "mix"}],
            },
            "optional": {"mask": ["MASK"], "strength": ["FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0}]},
        },
        "output": ["IMAGE"],
        "output_name": ["image"],
    },
}
API = {
    "1": {"class_type": "Load", "inputs": {"image": "face.png"}, "_meta": {"title": "Photo", "pos": [5, 6]}},
    "7": {
        "class_type": "Blend",
        "inputs": {"first": ["1", 0], "mask": ["1", 1], "seed": 3, "mode": "add", "strength": 0.25},
    },
}


def test_there_and_back_is_the_same_workflow():
    ui = ui_from_api(API, SCHEMAS, note="Hello", name="x")
    assert api_from_ui(ui, SCHEMAS) == {key: {k: v for k, v in e.items() if k != "_meta"} for key, e in API.items()}


def test_ui_form_is_what_the_frontend_reads():
    ui = ui_from_api(API, SCHEMAS, note="Hello")
    load, blend, note = ui["nodes"]
    assert (load["pos"], load["title"], load["widgets_values"]) == ([5, 6], "Photo", ["face.png", "image"])
    assert blend["widgets_values"] == [3, "fixed", "add", 0.25]
    assert note["widgets_values"] == ["Hello"]
    assert (ui["last_node_id"], ui["last_link_id"]) == (8, 2)
    assert [output["links"] for output in load["outputs"]] == [[1], [2]]
    for link, source, slot, target, place, kind in ui["links"]:
        nodes = {node["id"]: node for node in ui["nodes"]}
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == link
        assert nodes[target]["inputs"][place]["type"] == kind


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"mode": "burn"}, "Blend.mode is 'burn'"),
        ({"strength": 2.0}, "Blend.strength is 2.0"),
        ({"first": ["1", 1]}, "Blend.first is linked to MASK"),
        ({"first": ["9", 0]}, "Blend.first is linked to nothing"),
        ({"first": 4}, "Blend.first is no link"),
        ({"extra": 4}, "Blend has no input extra"),
    ],
)
def test_faults_are_found(change, fault):
    assert faults(API, SCHEMAS) == []
    (found,) = faults(with_inputs(API, {"Blend": change}), SCHEMAS)
    assert fault in found


def test_unknown_node_and_missing_input_are_found():
    assert faults({"1": {"class_type": "Gone", "inputs": {}}}, SCHEMAS) == ["1: no node Gone"]
    assert faults({"1": {"class_type": "Load", "inputs": {}}}, SCHEMAS) == ["1: image is missing"]


def test_forms_saved_before_an_optional_input_was_added_stay_good():
    """The host fills optional inputs, the frontend widgets: nodes may get inputs and saved workflows still run."""
    saved = ui_from_api(API, SCHEMAS)
    blend = SCHEMAS["Blend"]["input"]
    later = {
        "softness": ["FLOAT", {"default": 0.1, "min": 0.0, "max": 1.0}],
        "guide": ["IMAGE"],
        "order": ["COMBO", {"options": ["up", "down"]}],
    }
    grown = {**SCHEMAS, "Blend": {**SCHEMAS["Blend"], "input": {**blend, "optional": {**blend["optional"], **later}}}}
    assert faults(API, grown) == []
    filled = completed(API, grown)
    assert filled["7"]["inputs"] == API["7"]["inputs"] | {"softness": 0.1, "order": "up"}
    assert "guide" not in filled["7"]["inputs"] and faults(filled, grown) == []
    assert {key: entry["inputs"] for key, entry in api_from_ui(saved, grown).items()} == {
        key: entry["inputs"] for key, entry in filled.items()
    }


def test_a_required_input_is_no_default():
    without = {**API, "7": {**API["7"], "inputs": {"mask": ["1", 1], "seed": 3, "mode": "add"}}}
    assert faults(without, SCHEMAS) == ["7: first is missing"]
    assert faults(completed(without, SCHEMAS), SCHEMAS) == ["7: first is missing"]
