"""Every example workflow: its two forms agree, fit the real server's schemas, and run."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_ins import LAYOUT, fusion_inputs, put_photos
from workflow_forms import api_from_ui, completed, faults, with_inputs

EXAMPLES = Path(__file__).resolve().parents[1] / "example_workflows"
FUSION = ("one_person", "three_people")  # the guidance examples run in tests/host/test_guidance_workflows.py
PHOTOS = {
    **{"person": "syn00", "person_a": "syn01", "person_b": "syn02", "person_c": "syn03"},
    **{"person_1": "trip0_a", "person_2": "trip0_b", "person_3": "trip0_c"},
}
SIDE = 128
WITHOUT_SAMPLER = ("save_identity",)
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
    assert samplers or name in WITHOUT_SAMPLER
    assert {(inputs["sampler_name"], inputs["steps"]) for inputs in samplers} <= {("euler_ancestral", 25)}


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
    put_photos(server, assets, PHOTOS)
    for name, side in (("mask_left", 0), ("mask_right", 1)):
        half_painted(side).save(server.base / "input" / f"{name}.png")
    Image.new("RGB", (SIDE, SIDE)).save(server.base / "input" / "pose.png")
    return fusion_inputs(server, small_models, assets, side=SIDE) | {
        "LoraLoader": {"lora_name": small_models.lora(LAYOUT).name},
        "ControlNetLoader": {"control_net_name": small_models.controlnet(LAYOUT).name},
    }


def half_painted(side: int) -> Image.Image:
    """A picture whose left (0) or right (1) half was painted in the mask editor, which makes it transparent."""
    alpha = Image.new("L", (SIDE, SIDE), 255)
    alpha.paste(0, (side * SIDE // 2, 0, (side + 1) * SIDE // 2, SIDE))
    picture = Image.new("RGBA", (SIDE, SIDE), (120, 120, 120, 255))
    picture.putalpha(alpha)
    return picture


def run(server, name: str, inputs: dict[str, dict]) -> tuple[list[np.ndarray], dict[str, dict]]:
    """The saved pictures `[H, W, 3]` of an example, and its outputs by node class."""
    workflow = with_inputs(api_form(name), inputs)
    outputs = server.queue(workflow)["outputs"]
    kinds = {workflow[key]["class_type"]: output for key, output in outputs.items()}
    images = kinds.get("SaveImage", {}).get("images", [])
    pictures = [np.asarray(Image.open(io.BytesIO(server.view(image)))).astype(np.float32) for image in images]
    return pictures, kinds


@pytest.mark.parametrize("name", FUSION)
def test_example_makes_a_picture_on_the_real_server(name, server, stand_ins):
    (picture,), kinds = run(server, name, stand_ins)
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture.std() > 5
    assert "16 of 16" in kinds["PreviewAny"]["text"][0]


def test_training_free_needs_no_adapter(server, stand_ins):
    free = stand_ins | {"FusedIDAttentionPatch": {"reference_size": SIDE}}
    (picture,), kinds = run(server, "training_free", free)
    off = {"FusedIDAttentionPatch": {"reference_size": SIDE, "strength": 0.0}}
    (plain,), _ = run(server, "training_free", stand_ins | off)
    assert kinds["PreviewAny"]["text"][0].startswith("16 of 16 layers, 1 reference")
    assert "in self-attention" in kinds["PreviewAny"]["text"][0]
    assert np.abs(picture - plain).max() > 10


def test_attention_map_shows_both_people_and_leaves_the_picture_alone(server, stand_ins):
    free = stand_ins | {"FusedIDAttentionPatch": {"reference_size": SIDE}}
    workflow = with_inputs(api_form("attention_map"), free)
    outputs = server.queue(workflow)["outputs"]
    by_title = {workflow[key].get("_meta", {}).get("title"): output for key, output in outputs.items()}
    report = by_title["Shares in numbers"]["text"][0]
    assert re.fullmatch(r"picture 1: 1 A: .* % at most\npicture 1: 2 B: .* % at most", report)
    overlay = np.asarray(Image.open(io.BytesIO(server.view(by_title["Who was looked at"]["images"][0]))).convert("RGB"))
    assert overlay.shape[1] == 512 and overlay.shape[0] > 512, "enlarged, with a legend below"
    (recorded,), _ = run(server, "attention_map", free)
    unrecorded = api_form("attention_map")
    unrecorded["5"]["inputs"]["model"] = ["10", 0]
    unrecorded = {key: node for key, node in unrecorded.items() if key not in ("15", "16", "17")}
    outputs = server.queue(with_inputs(unrecorded, free))["outputs"]
    plain = np.asarray(Image.open(io.BytesIO(server.view(outputs["7"]["images"][0])))).astype(np.float32)
    assert np.array_equal(recorded, plain)


def test_several_references_are_all_seen(server, stand_ins):
    _, kinds = run(server, "several_references", stand_ins)
    assert "3 references" in kinds["PreviewAny"]["text"][0]


def test_a_lora_changes_the_picture_and_every_layer_is_patched(server, stand_ins):
    (with_lora,), kinds = run(server, "lora_and_adapter", stand_ins)
    off = {"LoraLoader": stand_ins["LoraLoader"] | {"strength_model": 0.0, "strength_clip": 0.0}}
    (without,), _ = run(server, "lora_and_adapter", stand_ins | off)
    assert np.abs(with_lora - without).mean() > 0.5
    assert "16 of 16" in kinds["PreviewAny"]["text"][0]


def test_pose_and_two_people_work_together(server, stand_ins):
    (posed,), kinds = run(server, "pose_two_people", stand_ins)
    free = {"ControlNetApplyAdvanced": {"strength": 0.0}}
    (unposed,), _ = run(server, "pose_two_people", stand_ins | free)
    assert np.abs(posed - unposed).mean() > 0.5
    assert "2 people routed" in kinds["PreviewAny"]["text"][0]


def test_a_large_picture_is_refined_in_tiles_and_then_face_by_face(server, assets, stand_ins):
    """Random models draw no faces, so the heads are found in a photo of two people."""
    photo = Image.new("RGB", (400, 400), (120, 120, 120))
    for number, name in enumerate(("syn03", "syn01")):
        face = Image.open(assets / "faces" / "sfhq_crops" / f"{name}.jpg").resize((200, 200))
        photo.paste(face, (200 * number, 100))
    photo.save(server.base / "input" / "two_people.png")
    parts = {"FusedIDCutPicture": {"size": SIDE, "margin": 0.0}}
    workflow = with_inputs(api_form("large_picture"), stand_ins | parts)
    (last_router,) = [node for node in workflow.values() if "content" in node["inputs"]]
    workflow["photo"] = {"class_type": "LoadImage", "inputs": {"image": "two_people.png"}}
    last_router["inputs"]["content"] = ["photo", 0]
    outputs = server.queue(workflow)["outputs"]
    by_kind = {workflow[key]["class_type"]: output for key, output in outputs.items() if key != "14"}
    pictures = [by_kind[kind]["images"] for kind in ("PreviewImage", "SaveImage")]
    assert [len(images) for images in pictures] == [1, 1], "one picture of many parts"
    tiled, done = (np.asarray(Image.open(io.BytesIO(server.view(one))).convert("RGB")) for (one,) in pictures)
    assert tiled.shape == done.shape == (2 * SIDE, 2 * SIDE, 3)
    assert np.abs(done.astype(float) - tiled).max() > 5 and np.array_equal(done[0], tiled[0])


def test_sdxl_example_patches_an_sdxl_model(server, stand_ins, small_models):
    sdxl = {
        "CheckpointLoaderSimple": {"ckpt_name": small_models.sdxl_checkpoint("sdxl_tiny").name},
        "FusedIDAttentionPatch": {"adapter": small_models.adapter("sdxl_tiny").name},
    }
    try:
        (picture,), kinds = run(server, "sdxl", stand_ins | sdxl)
    finally:
        server.free()  # the text encoder of SDXL is large
    assert picture.std() > 5
    assert "17 of 17" in kinds["PreviewAny"]["text"][0]


def test_a_folder_of_faces_makes_a_picture_for_each(server, assets, stand_ins):
    put_photos(server, assets, {"faces/anna": "syn04", "faces/bert": "syn05"})
    workflow = with_inputs(api_form("batch_of_faces"), stand_ins)
    outputs = server.queue(workflow)["outputs"]
    images = [
        image
        for key, output in outputs.items()
        if workflow[key]["class_type"] == "SaveImage"
        for image in output["images"]
    ]
    assert [image["filename"].split("_")[0] for image in images] == ["anna", "bert"]
    assert server.view(images[0]) != server.view(images[1])


def test_a_saved_identity_makes_the_same_picture_as_the_photo(server, stand_ins):
    run(server, "save_identity", stand_ins)
    assert (server.base / "models" / "identities" / "person.safetensors").is_file()
    (saved,), _ = run(server, "saved_identity", stand_ins)
    (fresh,), _ = run(server, "one_person", stand_ins)
    assert np.array_equal(saved, fresh)


def test_evaluation_judges_every_picture_and_saves_them_sorted(server, stand_ins):
    few = {"EmptyLatentImage": stand_ins["EmptyLatentImage"] | {"batch_size": 2}}
    pictures, kinds = run(server, "evaluation", stand_ins | few)
    assert len(pictures) == 2
    assert "person" in kinds["FusedIDFaceSimilarity"]["text"][0]


def test_strength_strip_starts_with_the_unpatched_model(server, stand_ins):
    (strip,), _ = run(server, "strength_strip", stand_ins)
    panels = np.split(strip, 5, axis=1)
    plain = api_form("strength_strip")
    first = plain["21"]["inputs"]
    plain = {key: plain[key] for key in ("1", "2", "3", "4", "21", "22")} | {"7": saver("22")}
    first["model"] = ["1", 0]
    outputs = server.queue(with_inputs(plain, stand_ins))["outputs"]
    unpatched = np.asarray(Image.open(io.BytesIO(server.view(outputs["7"]["images"][0])))).astype(np.float32)
    assert np.array_equal(panels[0], unpatched)
    assert all(np.abs(panel - panels[0]).mean() > 0.5 for panel in panels[1:])


def saver(source: str) -> dict:
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": "plain"}}
