"""Fixtures of the faces tests: real pictures and encoders, and a small stand-in encoder for pure logic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from faces.cache import clear_face_cache
from faces.encoder import Face, FaceEncoder
from faces.identity import EncoderFingerprint, Identity, Reference
from faces.opencv_backend import find_opencv_files, open_opencv_encoder
from faces.pack_choice import open_encoder

Run = Callable[..., tuple[Any, ...]]
EMBED_DEFAULTS: dict[str, Any] = {
    "face": "largest",
    "number": 1,
    "no_face": "error",
    "weights": "",
    "min_size": 0,
    "min_sharpness": 0.0,
    "min_score": 0.0,
    "margin": 0.3,
    "name": "",
}
POINTS = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], dtype=np.float32)


def new_face(x: float, y: float, side: float, score: float = 0.9) -> Face:
    return Face((x, y, x + side, y + side), score, POINTS * np.float32(side) + np.float32([x, y]))


def new_fingerprint(name: str = "stand-in", digest: str = "a" * 64, dim: int = 4) -> EncoderFingerprint:
    return EncoderFingerprint(name, "insightface", digest, "d" * 64, dim, "test only")


def new_reference(embedding: list[float] | None, *, weight: float = 1.0, shade: int = 100) -> Reference:
    crop = np.full((32, 32, 3), shade, dtype=np.uint8)
    vector = None if embedding is None else np.array(embedding, dtype=np.float32)
    keypoints = None if embedding is None else POINTS * np.float32(32)
    return Reference(crop, vector, keypoints, 0.8, weight)


def new_identity(*embeddings: list[float], weights: list[float] | None = None, name: str = "") -> Identity:
    shares = weights or [1.0] * len(embeddings)
    references = [new_reference(e, weight=w, shade=i + 1) for i, (e, w) in enumerate(zip(embeddings, shares))]
    return Identity(tuple(references), new_fingerprint(), name)


@dataclass
class StandInEncoder:
    """Finds what `seen` says for a look of that size (and says so of any picture); embeds by mean colours."""

    seen: Callable[[np.ndarray, int], list[Face]]
    fingerprint: EncoderFingerprint = field(default_factory=new_fingerprint)
    provider: str = "CPU"
    det_size: int = 640
    score_floor: float = 0.5
    looks: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    embedded: int = 0

    def detect(self, image: np.ndarray, size: int, threshold: float) -> list[Face]:
        self.looks.append((image.shape, size))
        return [face for face in self.seen(image, size) if face.score >= threshold]

    def embed(self, aligned: np.ndarray) -> np.ndarray:
        self.embedded += len(aligned)
        colours = aligned.reshape(len(aligned), -1, 3).mean(axis=1)
        return np.concatenate([colours, np.ones((len(aligned), 1))], axis=1).astype(np.float32)


@pytest.fixture
def make_face() -> Callable[..., Face]:
    return new_face


@pytest.fixture
def make_fingerprint() -> Callable[..., EncoderFingerprint]:
    return new_fingerprint


@pytest.fixture
def make_reference() -> Callable[..., Reference]:
    return new_reference


@pytest.fixture
def make_identity() -> Callable[..., Identity]:
    return new_identity


@pytest.fixture
def stand_in() -> Callable[..., StandInEncoder]:
    return StandInEncoder


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    clear_face_cache()


@pytest.fixture
def load(assets: Path) -> Callable[[str], np.ndarray]:
    return lambda name: np.asarray(Image.open(assets / "faces" / name).convert("RGB"))


@pytest.fixture(scope="session")
def roots(assets: Path) -> list[Path]:
    return [assets / "insightface"]


@pytest.fixture(scope="session")
def scrfd_encoder(roots: list[Path]) -> FaceEncoder:
    return open_encoder("test_pack", roots)


@pytest.fixture(scope="session")
def yunet_encoder(assets: Path) -> FaceEncoder:
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    files = find_opencv_files([assets / "models"])
    assert files is not None
    return open_opencv_encoder(files, det_size=640)


@pytest.fixture(scope="session")
def tight_portraits(assets: Path) -> dict[str, np.ndarray]:
    paths = sorted((assets / "faces" / "sfhq_crops").glob("*.jpg"))
    return {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in paths}


@pytest.fixture
def run(pack: Any, face_models: Path) -> Run:
    """Executes a node as the host does; its outputs."""
    return lambda node_id, **inputs: pack.nodes[node_id].execute(**inputs).args


@pytest.fixture
def encoder(run: Run) -> Any:
    return run("LoadIdentityEncoder", face_pack="test_pack (any licence)", provider="auto", det_size=640)[0]


@pytest.fixture
def embed(run: Run, encoder: Any) -> Run:
    def embed(*pictures: np.ndarray, **inputs: Any) -> tuple[Any, ...]:
        return run("FaceEmbed", encoder=encoder, image=new_image(*pictures), **{**EMBED_DEFAULTS, **inputs})

    return embed


def new_image(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 255)


@pytest.fixture
def to_image() -> Callable[..., torch.Tensor]:
    return new_image


@pytest.fixture
def embed_defaults() -> dict[str, Any]:
    return dict(EMBED_DEFAULTS)
