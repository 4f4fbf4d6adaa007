"""Arithmetic of boxes ``(x0, y0, x1, y1)`` in pixels. Pure numpy."""

from __future__ import annotations

import numpy as np


def overlap_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box in ``[N, 4]`` with every box in ``[M, 4]``: ``[N, M]`` in [0, 1]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.prod(np.clip(high - low, 0, None), axis=2)
    union = _areas(a)[:, None] + _areas(b)[None, :] - inside
    return inside / np.maximum(union, 1e-9)


def keep_best(boxes: np.ndarray, scores: np.ndarray, max_overlap: float) -> list[int]:
    """Non-maximum suppression: indices of ``[N, 4]`` boxes, best score first, none overlapping a better one."""
    order = np.argsort(-scores, kind="stable")
    overlaps = overlap_matrix(boxes[order], boxes[order])
    alive = np.ones(len(order), dtype=bool)
    kept: list[int] = []
    for place in range(len(order)):
        if alive[place]:
            kept.append(int(order[place]))
            alive &= overlaps[place] <= max_overlap
    return kept


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
