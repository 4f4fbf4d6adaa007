"""From a folder of real portraits to a file that the node loads and samples with in the real ComfyUI."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers_twin import diffusers_unet
from fusion_lab import FusionLab, largest
from peer_ours import run_node
from PIL import Image

from attention.adapter import load_adapter
from attention.files import read_header
from training.prepare.__main__ import main as prepare
from training.train import main as train

pytestmark = [pytest.mark.host, pytest.mark.assets]
LAYOUT = "sd15_tiny"
STEPS, BATCH = 12, 4


@dataclass(frozen=True)
class Run:
    """What came of so many portraits."""

    data: Path
    adapter: Path
    log: list[dict[str, Any]]


@pytest.fixture(scope="module")
def base(small_models: Any, comfyui: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with the host's small UNet, so that the trained file fits the host's model."""
    sys.path.append(str(Path(__file__).parents[1] / "training_tests"))
    tiny_models = importlib.import_module("tiny_models")
    unet = diffusers_unet(small_models.load_unet(LAYOUT))
    return tiny_models.write_base(tmp_path_factory.mktemp("portraits") / "base", unet=unet, width=768)


def settings(**values: Any) -> list[str]:
    """`--set` words; `__` stands for the dot."""
    return [word for name, value in values.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]


def run_on(portraits: list[Path], base: Path, assets: Path, folder: Path) -> Run:
    """prepare with the real detector and recogniser in two processes, then a short training run."""
    photos = folder / "photos"
    photos.mkdir()
    for path in portraits:
        (photos / path.name).symlink_to(path)
    data, run = folder / "data", folder / "run"
    words = ["--config", "training/configs/prepare_small_photos.yaml", "--workers", "2", "--quiet"]
    faces = {"faces__pack": "test_pack", "faces__roots": json.dumps([str(assets / "insightface")])}
    sizes = {"crops__resolution": 64, "crops__reference_size": 64}
    assert prepare([*words, "--input", str(photos), "--output", str(data), *settings(**faces, **sizes)]) == 0
    where = {"run": run, "model__base": base, "data__root": data, "model__license": "CC0"}
    small = {"data__resolution": 64, "reference__size": 64, "data__workers": 0, "ema__decay": 0.9}
    schedule = {"schedule__steps": STEPS, "schedule__batch_size": BATCH, "schedule__warmup": 0, "optimizer__lr": 1e-3}
    engine = {"engine__precision": "fp32", "engine__device": "cpu", "log__every": 1, "log__trackers": "[]"}
    assert train(settings(**where, **small, **schedule, **engine)) == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return Run(data, run / "adapter.safetensors", log)


def identity_from(pack: Any, photo: Path, assets: Path) -> Any:
    """A person, from the nodes a user would take."""
    encoder = pack.submodule("faces.pack_choice").open_encoder("test_pack", [assets / "insightface"], det_size=320)
    pixels = torch.from_numpy(np.asarray(Image.open(photo).convert("RGB"), dtype=np.float32) / 255)[None]
    return run_node(pack.nodes["FaceEmbed"], encoder=encoder, image=pixels)[0]


@pytest.mark.parametrize("count", [24, pytest.param(874, marks=pytest.mark.slow)])
def test_portraits_become_a_file_that_the_node_samples_with(
    count: int, pack: Any, small_models: Any, base: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    portraits = sorted((assets / "faces" / "congress_gpo_225x275").glob("*.jpg"))[:count]
    assert len(portraits) == count
    run = run_on(portraits, base, assets, tmp_path)

    index = pq.read_table(run.data / "index.parquet").to_pylist()
    dropped = pq.read_table(run.data / "dropped.parquet").to_pylist()
    assert sorted(row["source"] for row in index + dropped) == [path.name for path in portraits]
    assert all(row["reason"] for row in dropped) and len(index) > 0.95 * count
    assert all(row["human"] and row["n_faces"] == 1 for row in index)
    losses = [line["loss"] for line in run.log if line["kind"] == "train"]
    assert len(losses) == STEPS and all(0 < loss < 10 for loss in losses)
    assert [line["loss"] > 0 for line in run.log if line["kind"] == "validation"] == [True]

    lab = FusionLab(pack, small_models, LAYOUT)
    adapter = load_adapter(run.adapter)
    assert adapter.settings.samples_seen == STEPS * BATCH and adapter.settings.license == "CC0"
    assert "fusedid.training_config" in read_header(run.adapter).metadata
    untrained = lab.unet.state_dict()
    for site in lab.sites:
        start = untrained[f"{site.path}.attn1.to_v.weight"]
        assert largest(adapter.projections[site.path].value.float() - start) > 1e-4, "training must have moved it"

    name = f"portraits_{count}.safetensors"
    (pack.host.base / "models" / "fusedid").mkdir(parents=True, exist_ok=True)
    shutil.copy(run.adapter, pack.host.base / "models" / "fusedid" / name)
    person = identity_from(pack, portraits[3], assets)
    assert person.encoder.recogniser_sha256 == adapter.settings.encoder
    patched, report = lab.patch(adapter=name, identity=person)
    assert f"{len(lab.sites)} of {len(lab.sites)}" in report
    with_face, without = lab.sample(patched), lab.sample(lab.model)
    assert torch.isfinite(with_face).all() and largest(with_face - without) > 1e-3
