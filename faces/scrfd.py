"""The SCRFD detector of InsightFace's packs (Guo et al. 2021), decoded here so that no compiled package is needed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from .boxes import keep_best
from .encoder import Face
from .sessions import OnnxModel

STRIDES_BY_OUTPUTS = {9: (8, 16, 32), 15: (8, 16, 32, 64, 128)}
"""Outputs come as all scores, then all boxes, then all key points; without key points a face cannot be aligned."""
ANCHORS_BY_OUTPUTS = {9: 2, 15: 1}
MEAN, SCALE = 127.5, 128.0
MAX_OVERLAP = 0.4
MULTIPLE = 32


def detect(model: OnnxModel, image: np.ndarray, size: int, threshold: float) -> list[Face]:
    """Faces in uint8 ``[H, W, 3]`` RGB, scaled into the top left of a black ``size`` x ``size`` square; best first."""
    size = max(MULTIPLE, round(size / MULTIPLE) * MULTIPLE)
    canvas, scale = letterbox(image, size)
    blob = (canvas.astype(np.float32) - MEAN) / SCALE
    outputs = model(blob.transpose(2, 0, 1)[None])
    boxes, scores, points = decode(outputs, size, threshold)
    kept = keep_best(boxes, scores, MAX_OVERLAP)
    return [_face(boxes[i] / np.tile(scale, 2), float(scores[i]), points[i] / scale) for i in kept]


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale a picture to fit ``size`` x ``size``, top left, black elsewhere; returns it and the factors ``[2]`` (x, y).

    Plain bilinear sampling, without Pillow's smoothing: what these detectors were trained and measured with.
    """
    height, width = image.shape[:2]
    ratio = size / max(height, width)
    new_width, new_height = max(1, int(width * ratio)), max(1, int(height * ratio))
    coefficients = (width / new_width, 0.0, 0.0, 0.0, height / new_height, 0.0)
    picture = Image.fromarray(image)
    scaled = picture.transform((new_width, new_height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    canvas[:new_height, :new_width] = np.asarray(scaled)
    return canvas, np.array([new_width / width, new_height / height])


def _face(box: np.ndarray, score: float, points: np.ndarray) -> Face:
    x0, y0, x1, y1 = (float(value) for value in box)
    return Face((x0, y0, x1, y1), score, points.astype(np.float32))


def decode(outputs: list[np.ndarray], size: int, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes ``[N, 4]``, scores ``[N]`` and key points ``[N, 5, 2]`` above the threshold, in pixels of the square."""
    strides, anchors = STRIDES_BY_OUTPUTS[len(outputs)], ANCHORS_BY_OUTPUTS[len(outputs)]
    levels = len(strides)
    all_boxes, all_scores, all_points = [], [], []
    for level, stride in enumerate(strides):
        scores = outputs[level].reshape(-1)
        found = np.flatnonzero(scores >= threshold)
        centres = _anchor_centres(size // stride, stride, anchors)[found]
        distances = outputs[levels + level].reshape(-1, 4)[found] * stride
        offsets = outputs[2 * levels + level].reshape(-1, 5, 2)[found] * stride
        all_scores.append(scores[found])
        all_boxes.append(np.concatenate([centres - distances[:, :2], centres + distances[:, 2:]], axis=1))
        all_points.append(centres[:, None] + offsets)
    return np.concatenate(all_boxes), np.concatenate(all_scores), np.concatenate(all_points)


@lru_cache(maxsize=32)
def _anchor_centres(cells: int, stride: int, anchors: int) -> np.ndarray:
    rows, columns = np.mgrid[:cells, :cells]
    centres = np.stack([columns, rows], axis=-1).reshape(-1, 2) * stride
    return np.repeat(centres, anchors, axis=0).astype(np.float32)
