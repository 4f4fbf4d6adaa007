"""YuNet and SFace: files are found by name, SFace may be missing, and both run through OpenCV."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from faces import opencv_backend
from faces.opencv_backend import OpenCvEncoder, OpenCvFiles, find_opencv_files, open_opencv_encoder


def test_the_newest_float_models_are_found_and_earlier_folders_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    assert find_opencv_files([first, second, tmp_path / "none"]) is None
    for name in ("face_detection_yunet_2022mar", "face_detection_yunet_2023mar", "face_detection_yunet_2023mar_int8"):
        (second / f"{name}.onnx").touch()
    files = find_opencv_files([first, second])
    assert files == OpenCvFiles(second / "face_detection_yunet_2023mar.onnx", None)
    (first / "face_recognition_sface_2021dec.onnx").touch()
    (first / "face_detection_yunet_2022mar.onnx").touch()
    files = find_opencv_files([first, second])
    assert files == OpenCvFiles(
        first / "face_detection_yunet_2022mar.onnx", first / "face_recognition_sface_2021dec.onnx"
    )


def test_sface_gets_bgr_faces_and_its_rows_become_embeddings(
    tmp_path: Path, yunet_encoder: OpenCvEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFace's own file is not among the assets, so a recogniser that returns what it was given stands in."""
    seen: list[np.ndarray] = []

    def feature(picture: np.ndarray) -> np.ndarray:
        seen.append(picture)
        return np.arange(128, dtype=np.float32)[None]

    sface = tmp_path / "face_recognition_sface_2021dec.onnx"
    sface.write_bytes(b"stand-in")
    encoder = open_opencv_encoder(OpenCvFiles(yunet_encoder.files.detector, sface), det_size=640)
    assert encoder.fingerprint.dim == 128 and len(encoder.fingerprint.recogniser_sha256) == 64
    real: Any = opencv_backend._create
    recogniser = SimpleNamespace(feature=feature)
    monkeypatch.setattr(
        opencv_backend, "_create", lambda kind, *rest: recogniser if kind == "FaceRecognizerSF" else real(kind, *rest)
    )
    faces = np.zeros((2, 112, 112, 3), dtype=np.uint8)
    faces[:, :, :, 0] = 200
    assert encoder.embed(faces).shape == (2, 128)
    assert all((picture[:, :, 2] == 200).all() and not picture[:, :, 0].any() for picture in seen)


def test_damaged_models_are_value_errors(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    path = tmp_path / "face_detection_yunet_x.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"cannot load .*face_detection_yunet_x"):
        open_opencv_encoder(OpenCvFiles(path, None), det_size=640)


def test_without_opencv_the_pip_command_is_named(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    files = find_opencv_files([assets / "models"])
    assert files is not None
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        open_opencv_encoder(files, det_size=640)
