"""SSIM and PSNR of two aligned face crops, and the PSNR that 8-bit arithmetic makes of it."""

from __future__ import annotations

import numpy as np

PEAK = 255.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, dB; infinite for equal ones."""
    _require_pair(a, b)
    return _decibel(float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)))


def psnr_wrapped_uint8(a: np.ndarray, b: np.ndarray) -> float:
    """What `np.mean((a - b) ** 2)` gives when a and b are left uint8, dB: differences and squares wrap at 256.

    Wrong on purpose. Unrelated faces reach about 28 dB this way (correct: about 10), which is what table 2 of the face
    fusion paper shows for every method; it is only here to be set beside that table.
    """
    _require_pair(a, b)
    with np.errstate(over="ignore"):
        wrapped = (a - b) ** 2
    return _decibel(float(np.mean(wrapped.astype(np.float64))))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two uint8 `[H, W, 3]` pictures, in [-1, 1]; 7 px window.

    Raises ValueError when scikit-image is missing.
    """
    _require_pair(a, b)
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ValueError("SSIM needs scikit-image: pip install scikit-image") from error
    return float(structural_similarity(a, b, channel_axis=2, data_range=PEAK))


def _decibel(mean_square: float) -> float:
    return float("inf") if mean_square == 0 else float(10 * np.log10(PEAK**2 / mean_square))


def _require_pair(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(
            f"two uint8 pictures of one shape are compared, got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
