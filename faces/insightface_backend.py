"""Face packs in InsightFace's format, run by onnxruntime alone: the insightface package is not needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import arcface, scrfd
from .encoder import Face
from .identity import EncoderFingerprint
from .onnx_header import OnnxHeader, read_header
from .packs import FacePack
from .sessions import OnnxModel, file_sha256, load_model

SCORE_FLOOR = 0.5
"""Noise stays below 0.46, faces in photos start at 0.69 (measured on det_500m)."""


@dataclass(frozen=True, eq=False)
class InsightFaceEncoder:
    """SCRFD and ArcFace. Satisfies :class:`faces.encoder.FaceEncoder`."""

    pack: FacePack
    fingerprint: EncoderFingerprint
    det_size: int
    detector: OnnxModel
    recogniser: OnnxModel
    recogniser_header: OnnxHeader
    fixed_size: int | None = None
    """The only size the detector takes, if its file fixes one."""
    score_floor: float = SCORE_FLOOR

    @property
    def provider(self) -> str:
        """Where the recogniser really runs, e.g. ``CUDA``."""
        return self.recogniser.provider

    def detect(self, image: np.ndarray, size: int, threshold: float) -> list[Face]:
        """One pass over uint8 ``[H, W, 3]`` RGB scaled into ``size`` x ``size``; best score first."""
        return scrfd.detect(self.detector, image, self.fixed_size or size, threshold)

    def embed(self, aligned: np.ndarray) -> np.ndarray:
        """Raw embeddings float32 ``[N, D]`` of uint8 ``[N, 112, 112, 3]`` RGB aligned faces."""
        return arcface.embed(self.recogniser, self.recogniser_header, aligned)


def open_pack(pack: FacePack, *, det_size: int, provider: str = "auto") -> InsightFaceEncoder:
    """Load a pack's detector and recogniser. ``ValueError`` when a file or the provider is unusable."""
    detector, recogniser = load_model(pack.detector, provider), load_model(pack.recogniser, provider)
    header = read_header(pack.recogniser)
    detector_shape = next(iter(read_header(pack.detector).inputs.values()))
    blank = np.zeros((1, 112, 112, 3), dtype=np.uint8)
    fingerprint = EncoderFingerprint(
        name=pack.name,
        backend="insightface",
        recogniser_sha256=file_sha256(pack.recogniser),
        detector_sha256=file_sha256(pack.detector),
        # Some exporters leave the output's width free, so it is asked from the model itself.
        dim=arcface.embed(recogniser, header, blank).shape[1],
        license=pack.license,
    )
    return InsightFaceEncoder(
        pack, fingerprint, det_size, detector, recogniser, header, fixed_size=_fixed_size(pack, detector_shape)
    )


def _fixed_size(pack: FacePack, shape: tuple[int | None, ...]) -> int | None:
    height, width = shape[2:]
    if height != width:
        raise ValueError(
            f"the detector {pack.detector} takes only pictures of {width} x {height}; wanted is one of free or square "
            "size: choose another face pack"
        )
    return height
