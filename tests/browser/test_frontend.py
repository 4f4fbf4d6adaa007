"""What users see, in the real frontend of the real server: templates, help, wires, pictures, errors."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from build_subgraphs import BLUEPRINTS as BLUEPRINTS_MADE
from build_subgraphs import blueprint_form
from frontend import NODE
from PIL import Image
from stand_ins import fusion_inputs, put_face_pack, put_photos
from workflow_forms import input_specs, ui_from_api

pytestmark = pytest.mark.browser

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
BLUEPRINTS = sorted((EXAMPLES.parent / "subgraphs").glob("*.json"))
SIDE = 128
SHEET_SIDE = 512


@pytest.fixture(scope="module")
def stand_ins(server, small_models, assets, english_page) -> dict[str, Any]:
    put_photos(server, assets, {"person": "syn00"})
    Image.new("RGB", (256, 256), (90, 120, 90)).save(server.base / "input" / "no_face.png")
    sheet = Image.open(assets / "faces" / "sfhq_sheets" / "SFHQ_sample_1x2.jpg")
    sheet.resize((2 * SHEET_SIDE, SHEET_SIDE)).save(server.base / "input" / "two_faces.png")
    inputs = fusion_inputs(server, small_models, assets, side=SIDE)
    english_page.refresh_lists()
    return inputs


@pytest.fixture(params=["classic", "nodes 2.0"])
def renderer(request, frontend) -> Iterator[str]:
    """What draws the nodes of `frontend`."""
    if request.param != "classic" and not frontend.folds:
        pytest.skip("this frontend's Nodes 2.0 are an experiment (0.3.64's are)")
    frontend.draw_by(request.param)
    yield request.param
    frontend.tidy()
    frontend.draw_by("classic")


@pytest.fixture
def preview_graph(server, assets) -> dict[str, Any]:
    """Face pack, photo, FaceEmbed and the preview of what it found, in UI form."""
    api = {
        "1": {"class_type": "LoadIdentityEncoder", "inputs": {"face_pack": put_face_pack(server, assets)}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "two_faces.png"}},
        "3": {"class_type": "FaceEmbed", "inputs": {"encoder": ["1", 0], "image": ["2", 0], "face": "left to right"}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 1]}},
    }
    return ui_from_api(api, server.object_info())


def test_every_template_is_listed_with_its_thumbnail(frontend):
    frontend.open_templates()
    frontend.screenshot("templates")
    wanted = {path.stem: True for path in EXAMPLES.glob("*.json")}
    assert frontend.shown_templates(len(wanted)) == wanted


def test_template_opens_without_missing_nodes_and_runs_to_a_picture(frontend, stand_ins):
    frontend.open_templates()
    frontend.open_template("one_person")
    assert [node["type"] for node in frontend.nodes() if not node["known"]] == []
    faulty = {node["type"] for node in frontend.nodes() if node["broken"]}
    assert faulty <= {"CheckpointLoaderSimple", "FusedIDAttentionPatch"}, "only files that nobody has yet are missing"
    frontend.screenshot("one_person")
    frontend.set_widgets(stand_ins)
    frontend.page.wait_for_timeout(500)
    assert [node["type"] for node in frontend.nodes() if node["broken"]] == []
    assert frontend.page.get_by_text("errors found").count() == 0
    frontend.run()
    assert frontend.picture_size("SaveImage") == [SIDE, SIDE]
    frontend.screenshot("one_person_done")
    assert [node for node in frontend.nodes() if node["broken"] or node["errors"]] == []
    assert "16 of 16" in frontend.value("PreviewAny", "widgets.map(widget => String(widget.value)).join(' ')")


def test_help_panel_shows_our_page(frontend):
    frontend.start_with("FaceEmbed")
    frontend.select("FaceEmbed")
    frontend.page.locator("[data-testid=info-button]").click()
    heading = frontend.page.locator(".node-help-content h1")
    heading.wait_for()
    assert heading.inner_text() == "Face Embed"
    picture = frontend.page.locator(".node-help-content img").first
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    frontend.screenshot("help")


def test_wrong_wire_cannot_be_connected_and_a_right_one_can(frontend):
    frontend.start_with("LoadImage", "FaceEmbed")
    frontend.drag_wire(("LoadImage", 0), ("FaceEmbed", "encoder"))
    assert not frontend.wired("FaceEmbed", "encoder")
    frontend.page.keyboard.press("Escape")
    frontend.drag_wire(("LoadImage", 0), ("FaceEmbed", "image"))
    assert frontend.wired("FaceEmbed", "image")


def test_no_face_is_said_on_the_node_that_looked(frontend, stand_ins, preview_graph):
    frontend.load(preview_graph)
    frontend.set_widgets({"LoadImage": {"image": "no_face.png"}})
    frontend.run()
    told = frontend.told_error("no face found")
    frontend.screenshot("no_face")
    assert "FaceEmbed: picture 1: no face found" in told and "skip image" in told, "what happened and what to do"
    error = frontend.page.evaluate("() => app.lastExecutionError")
    assert (error["node_type"], str(error["node_id"])) == ("FaceEmbed", str(frontend.value("FaceEmbed", "id")))


def test_preview_shows_the_numbers_of_the_faces(frontend, server, stand_ins, preview_graph):
    frontend.load(preview_graph)
    frontend.run()
    assert frontend.picture_size("PreviewImage") == [2 * SHEET_SIDE, SHEET_SIDE]
    frontend.screenshot("preview")
    path = frontend.value("PreviewImage", "imgs[0].src").split(str(server.port))[1]
    shown = np.asarray(Image.open(io.BytesIO(server.get(path))).convert("RGB")).astype(int)
    photo = np.asarray(Image.open(server.base / "input" / "two_faces.png")).astype(int)
    drawn = np.abs(shown - photo).max(axis=-1) > 40
    left, right = drawn[:, :SHEET_SIDE], drawn[:, SHEET_SIDE:]
    assert left.sum() > 500 and right.sum() > 500, "a box with a label around each face"
    assert label_ink(shown[:, :SHEET_SIDE]) != label_ink(shown[:, SHEET_SIDE:]), "1 and 2 are different figures"


def label_ink(half: np.ndarray) -> int:
    """Black pixels on the label's colour (green or orange) in one half of the sheet."""
    coloured = (half[..., 1] > 150) & (half[..., 2] < 120)
    rows, columns = np.nonzero(coloured)
    block = half[rows.min() : rows.min() + 40, columns.min() : columns.min() + 40]
    return int((block.max(axis=-1) < 60).sum())


@pytest.fixture
def patch_inputs(server) -> tuple[list[str], list[str]]:
    """Widgets of the patch node in order: those that always show, and all of them."""
    specs = [spec for spec in input_specs(server.object_info("FusedIDAttentionPatch")) if spec.is_widget]
    return [spec.name for spec in specs if not spec.options.get("advanced")], [spec.name for spec in specs]


def test_classic_canvas_shows_every_input(frontend, patch_inputs):
    frontend.start_with("FusedIDAttentionPatch")
    frontend.fit()
    frontend.screenshot("classic")
    assert frontend.drawn_widgets("FusedIDAttentionPatch") == patch_inputs[1]


@pytest.mark.parametrize("renderer", ["nodes 2.0"], indirect=True)
def test_nodes_2_fold_advanced_inputs_until_asked_for(frontend, renderer, patch_inputs):
    usual, every = patch_inputs
    assert len(usual) < len(every) / 2
    frontend.start_with("FusedIDAttentionPatch")
    frontend.page.get_by_text("Show advanced inputs").wait_for()
    frontend.screenshot("folded")
    assert frontend.shown_labels() == usual
    frontend.press("Show advanced inputs")
    frontend.fit()
    frontend.screenshot("unfolded")
    assert frontend.shown_labels() == every
    frontend.load(frontend.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))"))
    assert frontend.shown_labels() == every, "a saved workflow keeps it open"
    frontend.press("Hide advanced inputs")
    assert frontend.shown_labels() == usual


def test_an_advanced_value_of_a_saved_workflow_is_run_shown_or_folded(frontend, renderer):
    frontend.load(json.loads((EXAMPLES / "one_person.json").read_text(encoding="utf-8")))
    assert frontend.queued_inputs("FusedIDAttentionPatch")["attention_scale"] == 1.0
    frontend.set_widgets({"FusedIDAttentionPatch": {"attention_scale": 1.5}})
    frontend.load(frontend.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))"))
    assert frontend.queued_inputs("FusedIDAttentionPatch")["attention_scale"] == 1.5


def test_no_node_of_a_template_lies_over_another(frontend, renderer):
    covered = {}
    for path in sorted(EXAMPLES.glob("*.json")):
        frontend.load(json.loads(path.read_text(encoding="utf-8")))
        covered[path.stem] = frontend.covered_nodes()
    frontend.screenshot(f"last_template_{renderer.replace(' ', '_')}")
    assert {name: pairs for name, pairs in covered.items() if pairs} == {}


@pytest.mark.parametrize("blueprint", BLUEPRINTS_MADE, ids=lambda blueprint: blueprint.name)
def test_blueprint_knows_the_sockets_of_today(server, blueprint):
    """Links name sockets by number: a file older than a node's new socket would wire the wrong one."""
    saved = json.loads((EXAMPLES.parent / "subgraphs" / f"{blueprint.name}.json").read_text(encoding="utf-8"))
    assert saved == blueprint_form(blueprint, server.object_info()), "write them anew: python dev.py subgraphs"


def test_blueprints_are_in_the_node_library(server):
    try:
        listed = server.get_json("/global_subgraphs")
    except HTTPError:
        pytest.skip("this ComfyUI offers no blueprints of custom nodes (0.3.64 does not)")
    assert {path.stem for path in BLUEPRINTS} <= {entry["name"] for entry in listed.values()}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprint_is_one_node_that_runs(frontend, stand_ins, path):
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    frontend.load(blueprint)
    (own,) = frontend.nodes()
    assert own["known"]
    frontend.add("CheckpointLoaderSimple", -400, 0)
    frontend.add("LoadImage", -400, 200)
    frontend.add("PreviewAny", 500, 0)
    frontend.add("PreviewImage", 500, 300)
    frontend.set_widgets(
        stand_ins
        | {
            "LoadImage": {"image": "two_faces.png"},
            own["type"]: stand_ins["LoadIdentityEncoder"] | stand_ins["FusedIDAttentionPatch"] | {"strength": 0.5},
        }
    )
    frontend.connect(("CheckpointLoaderSimple", 0), (own["type"], "model"))
    frontend.connect(("CheckpointLoaderSimple", 2), (own["type"], "vae"))
    for socket in blueprint["nodes"][0]["inputs"]:
        if socket["type"] == "IMAGE":
            frontend.connect(("LoadImage", 0), (own["type"], socket["name"]))
    frontend.connect((own["type"], 2), ("PreviewAny", "source"))
    frontend.connect((own["type"], 1), ("PreviewImage", "images"))
    frontend.fit()  # pictures are loaded when their node is drawn
    frontend.run()
    assert frontend.picture_size("PreviewImage") == [2 * SHEET_SIDE, SHEET_SIDE]
    report = "widgets.map(widget => String(widget.value)).join(' ')"
    frontend.wait_for(f"{NODE % 'PreviewAny'}.{report}.includes('of 16')")
    frontend.screenshot(path.stem.replace(" ", "_"))
    assert "16 of 16" in frontend.value("PreviewAny", report)


def test_nodes_speak_the_browsers_language(chinese_frontend):
    chinese_frontend.start_with("FaceEmbed")
    words = json.loads((EXAMPLES.parent / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))["FaceEmbed"]
    assert chinese_frontend.value("FaceEmbed", "title") == words["display_name"]
    labels = chinese_frontend.value("FaceEmbed", "widgets.map(widget => widget.label)")
    assert words["inputs"]["no_face"]["name"] in labels
    chinese_frontend.screenshot("chinese")
