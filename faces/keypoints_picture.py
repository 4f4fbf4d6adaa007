"""The picture of five key points that InstantID's ControlNet was trained on: black, the nose joined to the other four.

Joints are ellipses of the outer point's colour at 60 %, points are discs; 4 and 10 pixels wide at any size, as in
InstantID's own code, whose pictures are about 1024 pixels wide. Rasterised as OpenCV does it, which the ControlNet saw.
"""

from __future__ import annotations

import math

import numpy as np

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
"""Of left eye, right eye, nose, left and right corner of the mouth."""
NOSE = 2
JOINT_HALF_WIDTH, RADIUS = 4, 10
JOINT_LIGHT = 0.6


def draw_keypoints(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 `[height, width, 3]` RGB; points: `[5, 2]` in pixels of it. What lies outside is cut off."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    for number in (0, 1, 3, 4):
        corners = _ellipse(points[number].astype(np.float64), points[NOSE].astype(np.float64))
        _fill_rows(picture, *_rows_of_polygon(corners), COLOURS[number])
    picture = (picture * JOINT_LIGHT).astype(np.uint8)
    rows = np.arange(-RADIUS, RADIUS + 1)
    half = np.floor(np.sqrt(RADIUS * RADIUS - rows * rows)).astype(int)
    for (x, y), colour in zip(points, COLOURS, strict=True):
        _fill_rows(picture, int(y) + rows, int(x) - half, int(x) + half, colour)
    return picture


def placed(points: np.ndarray, from_wh: tuple[int, int], to_wh: tuple[int, int]) -> np.ndarray:
    """Points `[5, 2]` of a picture when it is fitted whole into the middle of another size."""
    scale = min(to_wh[0] / from_wh[0], to_wh[1] / from_wh[1])
    shift = (np.array(to_wh) - scale * np.array(from_wh)) / 2
    return (points * scale + shift).astype(np.float32)


def _ellipse(outer: np.ndarray, nose: np.ndarray) -> np.ndarray:
    """The ellipse between two points as a polygon with a corner per degree, in whole pixels: int `[361, 2]`."""
    dx, dy = outer - nose
    long, angle = int(math.hypot(dx, dy) / 2), math.radians(int(math.degrees(math.atan2(dy, dx))))
    turn = np.radians(np.arange(361))
    along, across = long * np.cos(turn), JOINT_HALF_WIDTH * np.sin(turn)
    x = along * math.cos(angle) - across * math.sin(angle) + int((outer[0] + nose[0]) / 2)
    y = along * math.sin(angle) + across * math.cos(angle) + int((outer[1] + nose[1]) / 2)
    return np.rint(np.stack([x, y], axis=1)).astype(int)


def _rows_of_polygon(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a convex polygon: its rows, and the first and last pixel of each, edges included."""
    top, bottom = corners[:, 1].min(), corners[:, 1].max()
    rows = np.arange(top, bottom + 1)
    first, last = np.full(len(rows), np.iinfo(int).max), np.full(len(rows), np.iinfo(int).min)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        for x, y in (_line(start, end), _crossings(start, end)):
            np.minimum.at(first, y - top, x)
            np.maximum.at(last, y - top, x)
    return rows, first, last


def _line(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (x, y) of a line, one per step along its longer side; halves go to the left end's side."""
    left, right = (start, end) if start[0] <= end[0] else (end, start)
    way = right - left
    steps = max(1, *np.abs(way))
    x, y = left[:, None] + np.sign(way)[:, None] * np.ceil(
        np.abs(way)[:, None] * np.arange(steps + 1) / steps - 0.5
    ).astype(int)
    return x, y


def _crossings(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a line meets the rows it passes; halves go to the right."""
    upper, lower = (start, end) if start[1] <= end[1] else (end, start)
    y = np.arange(upper[1], lower[1] + 1)
    x = upper[0] + (lower[0] - upper[0]) * (y - upper[1]) / max(1, lower[1] - upper[1])
    return np.floor(x + 0.5).astype(int), y


def _fill_rows(
    picture: np.ndarray, rows: np.ndarray, first: np.ndarray, last: np.ndarray, colour: tuple[int, int, int]
) -> None:
    height, width = picture.shape[:2]
    for row, a, b in zip(rows, first, last, strict=True):
        if 0 <= row < height and b >= 0 and a < width:
            picture[row, max(a, 0) : b + 1] = colour
