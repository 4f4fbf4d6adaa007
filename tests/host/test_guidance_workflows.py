"""The guidance examples run through the real server, with small random models in place of trained ones."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guidance_files import clip_vision_vit_l, clip_with_projection, guidance_for
from PIL import Image
from stand_ins import put_face_pack
from workflow_forms import with_inputs

pytestmark = [pytest.mark.host, pytest.mark.assets]

API = Path(__file__).resolve().parents[2] / "example_workflows" / "api"
PHOTOS = {
    "person.png": "syn00",
    "person_a.png": "syn01",
    "person_b.png": "syn02",
    "style.png": "syn03",
    "scene.png": "syn04",
}
SIZE = 64


@pytest.fixture(scope="module")
def stand_ins(server, small_models, assets) -> dict[str, dict[str, Any]]:
    """Inputs by node class that make an example run here and now."""
    models = server.base / "models"
    for name, photo in PHOTOS.items():
        image = Image.open(assets / "faces" / "sfhq_crops" / f"{photo}.jpg")
        # The photo that sampling starts from sets the size of the run.
        (image.resize((SIZE, SIZE)) if name == "scene.png" else image).save(server.base / "input" / name)
    return {
        "CheckpointLoaderSimple": {"ckpt_name": small_models.checkpoint("sd15_tiny").name},
        "CLIPVisionLoader": {"clip_name": clip_vision_vit_l(models).name},
        "CLIPLoader": {"clip_name": clip_with_projection(small_models).name},
        "LoadIdentityEncoder": {"face_pack": put_face_pack(server, assets)},
        "HybridGuidance": {"guidance": guidance_for(models, face_width=128).name},
        "EmptyLatentImage": {"width": SIZE, "height": SIZE},
        "KSampler": {"steps": 1, "cfg": 1.0},
    }


def run(server, name: str, stand_ins: dict[str, dict[str, Any]]) -> tuple[np.ndarray, dict[str, Any]]:
    """The saved picture of an example `[H, W, 3]` and all outputs by node id."""
    prompt = with_inputs(json.loads((API / f"{name}.json").read_text(encoding="utf-8")), stand_ins)
    outputs = server.queue(prompt)["outputs"]
    (saved,) = [key for key, entry in prompt.items() if entry["class_type"] == "SaveImage"]
    picture = Image.open(io.BytesIO(server.view(outputs[saved]["images"][0])))
    return np.asarray(picture).astype(np.float32), outputs


def panels(strip: np.ndarray) -> list[np.ndarray]:
    return np.split(strip, strip.shape[1] // SIZE, axis=1)


def test_style_face_text_is_a_strip_over_alpha(server, stand_ins):
    strip, _ = run(server, "style_face_text", stand_ins)
    assert strip.shape == (SIZE, 5 * SIZE, 3)
    steps = [np.abs(a - b).mean() for a, b in zip(panels(strip), panels(strip)[1:])]
    assert min(steps) > 0.05
    assert np.abs(panels(strip)[0] - panels(strip)[-1]).mean() > max(steps)


def test_identity_mixing_goes_from_one_person_to_the_other(server, stand_ins):
    strip, outputs = run(server, "identity_mixing", stand_ins)
    assert strip.shape == (SIZE, 5 * SIZE, 3)
    ends = np.abs(panels(strip)[0] - panels(strip)[-1]).mean()
    assert ends > np.abs(panels(strip)[0] - panels(strip)[1]).mean() > 0
    reports = [entry["text"][0] for entry in outputs.values() if "text" in entry]
    assert len(reports) == 5
    assert all("A" in report and "B" in report for report in reports)


def test_image_to_image_keeps_the_photos_layout(server, stand_ins):
    kept, _ = run(server, "image_to_image", {**stand_ins, "KSampler": {"steps": 4, "cfg": 1.0, "denoise": 0.1}})
    lost, _ = run(server, "image_to_image", {**stand_ins, "KSampler": {"steps": 4, "cfg": 1.0, "denoise": 1.0}})
    photo = np.asarray(Image.open(server.base / "input" / "scene.png").convert("RGB")).astype(np.float32)
    likeness = [np.corrcoef(blocks(photo), blocks(picture))[0, 1] for picture in (kept, lost)]
    assert likeness[0] > 0.5
    assert likeness[0] > likeness[1] + 0.2


def test_two_people_by_guidance_each_listen_to_their_own_photo(server, stand_ins):
    picture, outputs = run(server, "two_people_guidance", stand_ins)
    assert picture.shape == (SIZE, SIZE, 3)
    (report,) = [entry["text"][0] for entry in outputs.values() if "text" in entry]
    assert "faces: A, B" in report
    assert "2 regions, background mean" in report
    assert "self-attention separation 2" in report
    shutil.copyfile(server.base / "input" / "person_a.png", server.base / "input" / "kept.png")
    try:
        shutil.copyfile(server.base / "input" / "style.png", server.base / "input" / "person_a.png")
        other, _ = run(server, "two_people_guidance", stand_ins)
    finally:
        shutil.copyfile(server.base / "input" / "kept.png", server.base / "input" / "person_a.png")
    left, right = (np.abs(other - picture)[:, columns].mean() for columns in (slice(0, 28), slice(36, SIZE)))
    assert left > 2 * right


def blocks(picture: np.ndarray) -> np.ndarray:
    """Means of 8 x 8 pixels: the small autoencoder keeps no more than that."""
    side = SIZE // 8
    return picture.reshape(side, 8, side, 8, 3).mean((1, 3)).ravel()
