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
    assert "5 of 5 layers" in report
    assert {title: picture.shape for title, picture in shown.items() if title != "Both, routed"} == dict.fromkeys(
        (title for title in MINIATURE_PANELS if title != "Both, routed"), (128, 128, 3)
    )
    assert shown["Both, routed"].shape == (128, 256, 3)
    assert all(picture.std() > 20 for picture in shown.values())


def test_the_face_is_recognised_in_comfyui_too(pictures, assets):
    from training.demo import astronaut, found_face
    from training.people import open_pack
    from training.pictures import likeness

    encoder = open_pack("test_pack", [str(assets / "insightface")])
    face = found_face(astronaut(), encoder)
    alike = {
        title: likeness(face, pictures[0][title], encoder) or 0.0 for title in ("Without identity", "Value strength 1")
    }
    routed = likeness(face, pictures[0]["Both, routed"][:, :128], encoder) or 0.0
    assert alike["Value strength 1"] > alike["Without identity"] + 0.15, alike
    assert routed > alike["Without identity"] + 0.1, (routed, alike)


def test_the_template_names_the_shipped_files():
    workflow = json.loads((ROOT / "example_workflows" / "api" / "miniature.json").read_text(encoding="utf-8"))
    named = {value for node in workflow.values() for value in node["inputs"].values() if isinstance(value, str)}
    assert {MINIATURE, MINIATURE_ADAPTER} <= named
