"""Cutting faces out: the square crop with a margin, and the 112 px aligned face that recognisers were trained on."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .identity import ALIGNED_SIZE, SMALLEST_CROP

ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)
"""Where ArcFace models expect eyes, nose and mouth corners in a 112 px picture (Deng et al. 2019)."""
LARGEST_CROP = 1024
"""No reference pass looks at more pixels than this."""
DEFAULT_MARGIN = 0.3


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rotation, one scale and shift that take ``[N, 2]`` points closest to others: float64 ``[2, 3]``.

    Umeyama's least-squares fit (1991) without reflection; in the plane it is one complex division.
    """
    p = source[:, 0] + 1j * source[:, 1].astype(np.float64)
    q = target[:, 0] + 1j * target[:, 1].astype(np.float64)
    centred = p - p.mean()
    spread = float(np.sum(np.abs(centred) ** 2))
    if spread < 1e-6:
        raise ValueError("a face's key points all lie on one spot, so it cannot be aligned; use another picture")
    turn = np.sum(np.conj(centred) * (q - q.mean())) / spread
    shift = q.mean() - turn * p.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def warp(image: np.ndarray, matrix: np.ndarray, width: int, height: int) -> np.ndarray:
    """Apply ``[2, 3]`` (from ``image`` to the result, in pixel centres) bilinearly; black outside."""
    full = np.linalg.inv(np.vstack([matrix, [0.0, 0.0, 1.0]]))
    a, b, c = full[0]
    d, e, f = full[1]
    # Pillow samples at pixel centres + 0.5, the matrix speaks of pixel indices.
    c, f = c + 0.5 - 0.5 * (a + b), f + 0.5 - 0.5 * (d + e)
    picture = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
    )
    return np.asarray(picture)


def align_face(image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """The face of ``[H, W, 3]`` at five key points ``[5, 2]`` as uint8 ``[112, 112, 3]``, black outside the picture."""
    return warp(image, similarity_transform(keypoints, ARCFACE_POINTS), ALIGNED_SIZE, ALIGNED_SIZE)


def crop_square(
    image: np.ndarray, box: tuple[float, float, float, float], *, margin: float = DEFAULT_MARGIN
) -> tuple[np.ndarray, np.ndarray]:
    """Square around a box, ``margin`` of its longer side wider on each side, kept inside the picture where it can be.

    Near a border the square is moved inwards, in a tight picture it gets smaller, down to the box itself; only a box
    that does not fit any more is padded by repeating the edge pixels, because their streaks would show in the result.
    Returns the crop uint8 ``[S, S, 3]`` (S at most 1024) and the ``[2, 3]`` matrix from picture to crop pixels.
    """
    x0, y0, x1, y1 = box
    height, width = image.shape[:2]
    longer = max(x1 - x0, y1 - y0)
    wanted = max(SMALLEST_CROP, round(longer * (1 + 2 * margin)))
    side = min(wanted, max(min(height, width), round(longer), SMALLEST_CROP))
    left, top = _keep_inside((x0 + x1 - side) / 2, side, width), _keep_inside((y0 + y1 - side) / 2, side, height)
    return _cut(image, left, top, side)


def _keep_inside(start: float, side: int, length: int) -> int:
    return round(start) if side > length else min(max(round(start), 0), length - side)


def whole_square(image: np.ndarray) -> np.ndarray:
    """The whole picture as uint8 ``[S, S, 3]``, made square by repeating its edge pixels."""
    height, width = image.shape[:2]
    side = max(height, width, SMALLEST_CROP)
    return _cut(image, (width - side) // 2, (height - side) // 2, side)[0]


def transform_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a ``[2, 3]`` matrix to points ``[N, 2]``: float32 ``[N, 2]``."""
    return (points @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)


def _cut(image: np.ndarray, left: int, top: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = image.shape[:2]
    rows = np.clip(np.arange(top, top + side), 0, height - 1)
    columns = np.clip(np.arange(left, left + side), 0, width - 1)
    crop = image[rows[:, None], columns[None, :]]
    scale = min(1.0, LARGEST_CROP / side)
    if scale < 1:
        size = (LARGEST_CROP, LARGEST_CROP)
        crop = np.asarray(Image.fromarray(crop).resize(size, Image.Resampling.LANCZOS))
    # In pixel indices a resize also moves the first pixel's centre.
    shift = 0.5 * scale - 0.5
    matrix = np.array([[scale, 0.0, shift - left * scale], [0.0, scale, shift - top * scale]])
    return np.ascontiguousarray(crop), matrix
