"""FusedIDFaceFolder in the real ComfyUI: order, range, odd files, and a workflow that runs once per picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLOURS = {"b": (200, 20, 20), "a": (20, 200, 20), "c": (20, 20, 200)}


@pytest.fixture
def folder(comfyui: Any, pack: Any, request: pytest.FixtureRequest) -> Path:
    """A folder in input with pictures of three sizes, a text file and a folder."""
    place = comfyui.base / "input" / request.node.name
    (place / "deeper").mkdir(parents=True)
    for side, (name, colour) in zip((32, 48, 64), COLOURS.items()):
        Image.new("RGB", (side, 40), colour).save(place / f"{name}.png")
    (place / "notes.txt").write_text("no picture")
    return place


def run(pack: Any, folder: Path, *, first: int = 1, count: int = 0) -> tuple[list[Any], list[str]]:
    output = pack.nodes["FusedIDFaceFolder"].execute(folder=folder.name, first=first, count=count)
    return output.result


def test_pictures_come_by_name_in_their_own_size(pack, folder):
    images, names = run(pack, folder)
    assert names == ["a", "b", "c"]
    assert [tuple(image.shape) for image in images] == [(1, 40, 48, 3), (1, 40, 32, 3), (1, 40, 64, 3)]
    for image, name in zip(images, names):
        assert np.allclose(image[0, 0, 0].numpy() * 255, COLOURS[name], atol=0.5)


def test_a_part_of_the_folder(pack, folder):
    assert run(pack, folder, first=2, count=1)[1] == ["b"]
    assert run(pack, folder, first=3)[1] == ["c"]
    with pytest.raises(ValueError, match=r"^FusedIDFaceFolder: the folder .* has 3 pictures .* from number 4 on"):
        run(pack, folder, first=4)


def test_a_damaged_file_is_named(pack, folder):
    (folder / "broken.png").write_bytes(b"GIF?")
    with pytest.raises(ValueError, match=r"^FusedIDFaceFolder: broken.png cannot be read"):
        run(pack, folder)


def test_camera_turns_and_transparency_are_undone(pack, folder):
    turned = Image.new("RGB", (60, 30), (9, 9, 9))
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned.save(folder / "d.jpg", exif=exif)
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(folder / "e.png")
    images, _ = run(pack, folder, first=4)
    assert tuple(images[0].shape) == (1, 60, 30, 3)
    assert float(images[1].min()) == 1.0


def test_a_folder_that_is_not_there_is_refused_before_running(pack, folder):
    node = pack.nodes["FusedIDFaceFolder"]
    assert node.validate_inputs(folder=folder.name) is True
    assert "no folder 'gone'" in node.validate_inputs(folder="gone")
    assert "no folder '../models'" in node.validate_inputs(folder="../models")


def test_new_pictures_run_again(pack, folder):
    node = pack.nodes["FusedIDFaceFolder"]
    before = node.fingerprint_inputs(folder=folder.name, first=1, count=0)
    Image.new("RGB", (32, 32)).save(folder / "f.png")
    assert node.fingerprint_inputs(folder=folder.name, first=1, count=0) != before
