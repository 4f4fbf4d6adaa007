"""The demo's command line: what it takes, and what it says when something is missing. No server is started."""

from __future__ import annotations

import argparse
from pathlib import Path

import demo
import pytest


@pytest.fixture
def options() -> argparse.Namespace:
    return demo.parse(["--comfyui", "somewhere"])


def pack_in(root: Path, *parts: str) -> Path:
    """A face pack's folder with a file in it; returns the root."""
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True)
    (folder / "det.onnx").write_bytes(b"")
    return root


def test_missing_checkout_is_explained(tmp_path):
    with pytest.raises(SystemExit, match="must be a ComfyUI checkout"):
        demo.find_checkout(tmp_path)
    with pytest.raises(SystemExit, match="belong to --comfyui"):
        demo.without_comfyui(demo.parse(["--checkpoint", "model.safetensors"]))


def test_face_models_of_the_checkout_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDID_ASSETS", str(tmp_path / "assets"))
    assets = pack_in(tmp_path / "assets" / "insightface", "models", "other")
    assert demo.find_face_models(tmp_path / "ComfyUI", None) == assets.resolve()
    own = pack_in(tmp_path / "ComfyUI" / "models" / "insightface", "models", "antelopev2", "antelopev2")
    assert demo.find_face_models(tmp_path / "ComfyUI", None) == own.resolve()
    assert demo.find_face_models(tmp_path / "ComfyUI", assets) == assets.resolve()


def test_missing_face_models_are_explained(tmp_path):
    with pytest.raises(SystemExit, match="--face-pack-root"):
        demo.find_face_models(tmp_path, tmp_path)


def test_checkpoint_and_adapter_belong_together(tmp_path, options):
    options.checkpoint = tmp_path / "model.safetensors"
    with pytest.raises(SystemExit, match="belong together"):
        demo.base_models(tmp_path, options)
    options.adapter = tmp_path / "absent.safetensors"
    options.checkpoint.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"no file .*absent\.safetensors"):
        demo.base_models(tmp_path, options)


def test_given_files_are_linked_under_their_names(tmp_path, options):
    for name in ("checkpoint", "adapter"):
        place = tmp_path / f"{name}.safetensors"
        place.write_text(name)
        setattr(options, name, place)
    names = demo.base_models(tmp_path / "base", options)
    assert names == ("checkpoint.safetensors", "adapter.safetensors")
    assert (tmp_path / "base" / "models" / "checkpoints" / names[0]).read_text() == "checkpoint"
    assert (tmp_path / "base" / "models" / "fusedid" / names[1]).read_text() == "adapter"


def test_default_photo_is_the_astronaut(tmp_path):
    image = pytest.importorskip("PIL.Image").open(demo.photo_file(None, tmp_path))
    assert image.size == (512, 512)
    with pytest.raises(SystemExit, match="no such file"):
        demo.photo_file(tmp_path / "absent.jpg", tmp_path)
