"""The shipped miniature in the real ComfyUI: found as SD1.5, and its template makes a picture with a face."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from demo import MINIATURE, MINIATURE_ADAPTER, MINIATURE_PANELS, DemoFiles, choose_pack, run_workflow
from face_pack import copy_face_pack
from PIL import Image

pytestmark = [pytest.mark.host, pytest.mark.assets]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pictures(server, assets) -> tuple[dict[str, np.ndarray], str]:
    """The template's pictures by title on the astronaut's photo, and its report."""
    from skimage.data import astronaut

    from training.miniature import unpack

    unpack(server.base / "models")
    copy_face_pack(server.base / "models", assets)
    Image.fromarray(astronaut()).save(server.base / "input" / "astronaut.png")
    files = DemoFiles(
        checkpoint=MINIATURE,
        adapter=MINIATURE_ADAPTER,
        face_pack=choose_pack(server, "test_pack"),
        photo="astronaut.png",
    )
    images, report = run_workflow(server, files)
    shown = {title: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for title, data in images.items()}
    return shown, report


def test_the_template_runs_on_the_shipped_files(pictures):
    shown, report = pictures
    assert set(MINIATURE_PANELS) == set(shown)
    assert "3 of 3 layers" in report
    assert {title: picture.shape for title, picture in shown.items() if title != "Both, routed"} == dict.fromkeys(
        (title for title in MINIATURE_PANELS if title != "Both, routed"), (128, 128, 3)
    )
    assert shown["Both, routed"].shape == (128, 256, 3)
    assert all(picture.std() > 20 for picture in shown.values())


def test_the_face_is_seen_in_comfyui_too(pictures, assets):
    """Coarse colours of hair, skin and background: the first that the reference decides."""
    from training.demo import astronaut, found_face
    from training.people import open_pack

    face = found_face(astronaut(), open_pack("test_pack", [str(assets / "insightface")]))
    shown = pictures[0]
    far = {title: coarse_distance(face, shown[title]) for title in ("Without identity", "Strength 1")}
    assert far["Strength 1"] < 0.9 * far["Without identity"], far


def coarse_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two pictures at 8 x 8 pixels."""
    small = [np.asarray(Image.fromarray(each).resize((8, 8), Image.Resampling.BOX)).astype(float) for each in (a, b)]
    return float(np.abs(small[0] - small[1]).mean())


def test_the_template_names_the_shipped_files():
    workflow = json.loads((ROOT / "example_workflows" / "api" / "miniature.json").read_text(encoding="utf-8"))
    named = {value for node in workflow.values() for value in node["inputs"].values() if isinstance(value, str)}
    assert {MINIATURE, MINIATURE_ADAPTER} <= named
