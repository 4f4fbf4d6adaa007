"""ArcFace-style recognisers: 112 px aligned faces in, raw embeddings out."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .onnx_header import OnnxHeader
from .sessions import OnnxModel

BATCH = 16
"""Faces per run where the model takes batches: 112 px faces of the largest recogniser then stay far below 1 GiB."""


def normalisation(header: OnnxHeader) -> tuple[float, float]:
    """(mean, scale) of the recogniser's input: models converted from MXNet subtract and multiply by themselves."""
    names = [name for name, _ in header.first_nodes]
    subtracts = any(name.startswith(("Sub", "_minus")) for name in names)
    multiplies = any(name.startswith(("Mul", "_mul")) for name in names)
    return (0.0, 1.0) if subtracts and multiplies else (127.5, 127.5)


def embed(model: OnnxModel, header: OnnxHeader, aligned: np.ndarray) -> np.ndarray:
    """Raw embeddings float32 ``[N, D]`` of uint8 ``[N, 112, 112, 3]`` RGB."""
    mean, scale = normalisation(header)
    shape = next(iter(header.inputs.values()))
    side = shape[2] or aligned.shape[1]
    step = BATCH if shape[0] is None else int(shape[0])
    pictures = np.stack([_resize(face, side) for face in aligned])
    blob = ((pictures.astype(np.float32) - mean) / scale).transpose(0, 3, 1, 2)
    rows = [_run(model, blob[start : start + step], step if shape[0] else 0) for start in range(0, len(blob), step)]
    return np.concatenate(rows).astype(np.float32)


def _run(model: OnnxModel, blob: np.ndarray, fixed_batch: int) -> np.ndarray:
    missing = max(0, fixed_batch - len(blob))
    padded = np.concatenate([blob, np.repeat(blob[-1:], missing, axis=0)]) if missing else blob
    return model(padded)[0].reshape(len(padded), -1)[: len(blob)]


def _resize(face: np.ndarray, side: int) -> np.ndarray:
    if face.shape[0] == side:
        return face
    return np.asarray(Image.fromarray(face).resize((side, side), Image.Resampling.BILINEAR))
