"""The permissive choice: OpenCV's YuNet detector (MIT) and SFace recogniser (Apache-2.0), run by OpenCV itself.

The recogniser's file may be missing: then faces can be found and cropped, and only embedding them is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .encoder import Face
from .identity import EncoderFingerprint
from .install import pip_install
from .scrfd import letterbox
from .sessions import file_sha256

NAME = "opencv"
LICENSE = "MIT and Apache-2.0, commercial use allowed"
DETECTOR_PATTERN = "face_detection_yunet_*.onnx"
RECOGNISER_PATTERN = "face_recognition_sface_*.onnx"
SOURCE = "https://github.com/opencv/opencv_zoo"
SFACE_DIM = 128
MAX_OVERLAP = 0.3
TOP_K = 5000
SCORE_FLOOR = 0.7
"""Noise reaches 0.6, real faces start at 0.88 (measured on the 2023mar model)."""
OPENCV_PACKAGE = "opencv-python-headless"


@dataclass(frozen=True)
class OpenCvFiles:
    """Where the two models are; the recogniser may be missing."""

    detector: Path
    recogniser: Path | None


def find_opencv_files(folders: Sequence[Path]) -> OpenCvFiles | None:
    """The newest YuNet and SFace among the folders (earlier folders win), or None without a YuNet."""
    detector = _first(folders, DETECTOR_PATTERN)
    return OpenCvFiles(detector, _first(folders, RECOGNISER_PATTERN)) if detector is not None else None


def _first(folders: Sequence[Path], pattern: str) -> Path | None:
    for folder in folders:
        # int8 models need other kernels and give other embeddings.
        found = sorted(path for path in folder.glob(pattern) if "int8" not in path.name)
        if found:
            return found[-1]
    return None


@dataclass(eq=False)
class OpenCvEncoder:
    """YuNet and, when its file is there, SFace. Satisfies :class:`faces.encoder.FaceEncoder`."""

    files: OpenCvFiles
    fingerprint: EncoderFingerprint
    det_size: int
    provider: str = "OpenCV"
    score_floor: float = SCORE_FLOOR
    _models: dict[str, Any] = field(default_factory=dict)
    # OpenCV's model objects keep the input size as state, so two threads must not share a call.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def detect(self, image: np.ndarray, size: int, threshold: float) -> list[Face]:
        """One pass over uint8 ``[H, W, 3]`` RGB scaled into ``size`` x ``size``; best score first."""
        canvas, scale = letterbox(image, size)
        with self._lock:
            detector = self._detector()
            detector.setInputSize((size, size))
            detector.setScoreThreshold(threshold)
            _, rows = detector.detect(np.ascontiguousarray(canvas[:, :, ::-1]))
        if rows is None:
            return []
        return [_face(row, scale) for row in sorted(rows, key=lambda row: -row[14])]

    def embed(self, aligned: np.ndarray) -> np.ndarray:
        """Raw SFace embeddings float32 ``[N, 128]`` of uint8 ``[N, 112, 112, 3]`` RGB aligned faces."""
        if self.files.recogniser is None:
            raise ValueError(
                f"the opencv face pack can find faces but not recognise them: no {RECOGNISER_PATTERN} beside "
                f"{self.files.detector}; put face_recognition_sface_2021dec.onnx from {SOURCE} into that folder, or "
                "choose another face pack"
            )
        with self._lock:
            model = self._recogniser(self.files.recogniser)
            rows = [model.feature(np.ascontiguousarray(face[:, :, ::-1])).reshape(-1) for face in aligned]
        return np.stack(rows).astype(np.float32)

    def _detector(self) -> Any:
        if "detector" not in self._models:
            self._models["detector"] = _create(
                "FaceDetectorYN", self.files.detector, (320, 320), 0.5, MAX_OVERLAP, TOP_K
            )
        return self._models["detector"]

    def _recogniser(self, path: Path) -> Any:
        if "recogniser" not in self._models:
            self._models["recogniser"] = _create("FaceRecognizerSF", path)
        return self._models["recogniser"]


def open_opencv_encoder(files: OpenCvFiles, *, det_size: int) -> OpenCvEncoder:
    """An encoder over the given files. ``ValueError`` when OpenCV or a file is unusable."""
    fingerprint = EncoderFingerprint(
        name=NAME,
        backend="opencv",
        recogniser_sha256=file_sha256(files.recogniser) if files.recogniser else "",
        detector_sha256=file_sha256(files.detector),
        dim=SFACE_DIM if files.recogniser else 0,
        license=LICENSE,
    )
    encoder = OpenCvEncoder(files, fingerprint, det_size)
    encoder._detector()
    return encoder


def _create(kind: str, path: Path, *arguments: Any) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f"OpenCV is not installed, which the opencv face pack needs; run: {pip_install(OPENCV_PACKAGE)}"
        ) from error
    if not hasattr(cv2, kind):
        raise ValueError(
            f"this OpenCV ({cv2.__version__}) has no {kind}; run: {pip_install(OPENCV_PACKAGE, upgrade=True)}"
        )
    try:
        return getattr(cv2, kind).create(str(path), "", *arguments)
    except cv2.error as error:
        raise ValueError(
            f"OpenCV {cv2.__version__} cannot load {path}: the file is damaged or no {kind} model; "
            f"get it again from {SOURCE}"
        ) from error


def _face(row: np.ndarray, scale: np.ndarray) -> Face:
    x, y, width, height = row[:4] / np.tile(scale, 2)
    # YuNet orders the points as seen by the person's left and right: in the picture that is the same order as ours.
    points = row[4:14].reshape(5, 2) / scale
    return Face((float(x), float(y), float(x + width), float(y + height)), float(row[14]), points.astype(np.float32))
