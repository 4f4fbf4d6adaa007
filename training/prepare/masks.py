"""Stage ``mask``: the outline of the face region that FaceStudio's style image must not show (METHOD 2.5)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from .config import MaskConfig
from .reasons import alive
from .stage import Context, Stage, Tables
from .tables import DROP_FIELDS, FLOATS, Row

SCHEMA = pa.schema([("outline", FLOATS), *DROP_FIELDS])
ELLIPSE_POINTS = 48
LANDMARK_GROWTH = 2.2
"""Eyes and mouth corners span a bit less than half of a face's width and height."""


def masks(context: Context, tables: Tables, shard: int) -> list[Row]:
    """One row per listed file: the outline ``[P, 2]`` in source pixels, flat; null without a face."""
    rows: list[Row] = []
    for listed, scanned, unique, selected in zip(*(tables[name] for name in STAGE.needs), strict=True):
        if not alive(listed, scanned, unique, selected) or not selected["box"]:
            rows.append({})
            continue
        keypoints = np.array(selected["keypoints"], dtype=np.float64).reshape(5, 2)
        outline = face_outline(np.array(selected["box"]), keypoints, context.config.mask)
        rows.append({"outline": outline.reshape(-1).tolist()})
    return rows


def face_outline(box: np.ndarray, keypoints: np.ndarray, config: MaskConfig) -> np.ndarray:
    """Polygon float64 ``[P, 2]`` around a face, in the pixels of its box ``[4]`` and key points ``[5, 2]``."""
    growth = 1 + config.dilate
    if config.shape == "ellipse":
        return _ellipse(box, keypoints, growth)
    if config.shape == "box":
        x0, y0, x1, y1 = box
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)
        return _grow(corners, growth)
    return _grow(convex_hull(keypoints), LANDMARK_GROWTH * growth)


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull of ``[N, 2]``, in order (Andrew's monotone chain)."""
    ordered = sorted(map(tuple, points.tolist()))
    return np.array(_half_hull(ordered)[:-1] + _half_hull(ordered[::-1])[:-1], dtype=np.float64)


def _half_hull(ordered: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    hull: list[tuple[float, ...]] = []
    for point in ordered:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    return hull


def _turn(a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _ellipse(box: np.ndarray, keypoints: np.ndarray, growth: float) -> np.ndarray:
    x0, y0, x1, y1 = box
    angles = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
    circle = np.stack([np.cos(angles) * (x1 - x0) / 2, np.sin(angles) * (y1 - y0) / 2], axis=1) * growth
    across = keypoints[1] - keypoints[0]
    tilt = np.arctan2(across[1], across[0])
    turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    return circle @ turn + np.array([(x0 + x1) / 2, (y0 + y1) / 2])


def _grow(outline: np.ndarray, growth: float) -> np.ndarray:
    center = outline.mean(axis=0)
    return center + (outline - center) * growth


STAGE = Stage("mask", 1, ("list", "scan", "dedupe", "select"), SCHEMA, lambda config: config.mask, each=masks)
