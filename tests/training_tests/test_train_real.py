"""From real photos to the file the node loads: the three commands, with the real detector and recogniser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from attention.adapter import load_adapter
from training.export import main as export
from training.prepare.__main__ import main as prepare
from training.sample import main as sample
from training.train import main as train

PHOTOS = 10


@pytest.fixture
def photos(assets, tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted((assets / "faces" / "congress_gpo_450x550").iterdir())[:PHOTOS]:
        shutil.copy(path, folder)
    return folder


def with_settings(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]


@pytest.mark.assets
@pytest.mark.parametrize("latents", ["encode", "cached"])
def test_from_real_photos_to_a_file(latents, photos, assets, tiny_base, tmp_path, caplog):
    roots = json.dumps([str(assets / "insightface")])
    data, run = tmp_path / "data", tmp_path / "run"
    faces = {"faces__pack": "test_pack", "faces__roots": roots, "split__val": 0.3, "select__min_side": 200}
    crops = {"crops__resolution": 128, "crops__reference_size": 64, "cache__base_model": tiny_base}
    arguments = ["--input", str(photos), "--output", str(data), "--executor", "inline", "--quiet"]
    assert prepare([*arguments, *with_settings(**faces, **crops)]) == 0, caplog.text
    small = {"data__resolution": 128, "reference__size": 64, "schedule__steps": 3, "schedule__warmup": 0}
    engine = {"engine__precision": "fp32", "engine__device": "cpu", "data__workers": 0, "data__latents": latents}
    where = {"run": run, "model__base": tiny_base, "data__root": data, "log__trackers": "[]"}
    score = {"validation__pictures": 1, "validation__picture_steps": 2, "validation__samples": 2}
    pack = {"validation__face_pack": "test_pack", "validation__face_roots": roots}
    assert train(with_settings(**where, **small, **engine, **score, **pack)) == 0, caplog.text
    adapter = load_adapter(run / "adapter.safetensors")
    assert adapter.settings.samples_seen == 3 and len(adapter.settings.encoder) == 64
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    (validation,) = [line for line in log if line["kind"] == "validation"]
    assert validation["loss"] > 0 and 0 <= validation["found"] <= 1 and -1 <= validation["identity"] <= 1
    assert export(["--run", str(run), "--out", str(tmp_path / "release"), "--license", "CC0", "--data", str(data)]) == 0
    card = (tmp_path / "release" / "README.md").read_text(encoding="utf-8")
    assert f"{PHOTOS} kept" in card and str(tmp_path) not in card
    drawing = ["--base", str(tiny_base), "--adapter", str(tmp_path / "release" / "adapter.safetensors")]
    face = [
        "--face",
        str(next(photos.iterdir())),
        "--face-pack",
        "test_pack",
        "--face-root",
        str(assets / "insightface"),
    ]
    picture = tmp_path / "picture.png"
    size = ["--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
    assert sample([*drawing, *face, *size, "--out", str(picture)]) == 0, caplog.text
    assert Image.open(picture).size == (64, 64)
