"""Small photo folders and short ways to run the preparation on them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from training.config_io import load_config
from training.prepare.config import PrepareConfig
from training.prepare.pipeline import Summary, prepare

WITHOUT_FACES = [
    "faces.pack=none",
    "select.no_face=non_human",
    "select.min_side=32",
    "crops.resolution=64",
    "crops.reference_size=64",
    "run.executor=inline",
]
WITH_FACES = [
    "faces.pack=test_pack",
    "faces.det_size=320",
    "select.min_side=200",
    "select.min_face_side=60",
    "crops.resolution=64",
    "crops.reference_size=64",
    "run.executor=inline",
]


def pixels(seed: int, width: int = 48, height: int = 48) -> np.ndarray:
    """A smooth random picture: any two seeds differ in many bits of the perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def png(seed: int, width: int = 48, height: int = 48) -> bytes:
    return encode(Image.fromarray(pixels(seed, width, height)), "PNG")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def photo_folder(folder: Path, count: int, *, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        (folder / f"photo{seed:03d}.png").write_bytes(png(seed))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def make_config(source: Path | str, output: Path | str, *sets: str, base: list[str] = WITHOUT_FACES) -> PrepareConfig:
    return load_config(PrepareConfig, None, [f"input={source}", f"output={output}", *base, *sets])


def run(source: Path | str, output: Path | str, *sets: str, base: list[str] = WITHOUT_FACES) -> Summary:
    return prepare(make_config(source, output, *sets, base=base), quiet=True)


def index(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "index.parquet").to_pylist()


def dropped(output: Path) -> dict[str, str]:
    """{source: reason}"""
    return {row["source"]: row["reason"] for row in pq.read_table(output / "dropped.parquet").to_pylist()}


def digests(output: Path) -> dict[str, str]:
    """sha256 of everything a training run reads."""
    files = [path for kind in ("*.parquet", "shards/*.tar", "cache/**/*.safetensors") for path in output.glob(kind)]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
