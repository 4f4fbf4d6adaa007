"""From whatever picture array a caller has to the one kind used here: uint8 ``[H, W, 3]`` RGB."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SMALLEST_SIDE = 16
"""Smaller pictures hold no recognisable face."""


def as_rgb(picture: np.ndarray, number: int = 1) -> np.ndarray:
    """One picture ``[H, W]`` or ``[H, W, 1|3|4]``, uint8 or float in [0, 1], as uint8 ``[H, W, 3]``.

    Transparent pixels are laid over white; floats outside [0, 1] are cut off. ``number`` (from 1) names the picture in
    the ``ValueError`` for NaN, infinity, a wrong shape or type, or fewer than 16 pixels on a side.
    """
    array = np.asarray(picture)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"picture {number} has the shape {list(np.shape(picture))}; wanted is [height, width, channels] with 1, 3 "
            "or 4 channels"
        )
    if min(array.shape[:2]) < SMALLEST_SIDE:
        raise ValueError(
            f"picture {number} is {array.shape[1]} x {array.shape[0]} pixels; no face can be found in less than "
            f"{SMALLEST_SIDE} pixels on a side: use a larger picture"
        )
    return _flatten(_to_bytes(array, number))


def as_rgb_batch(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every picture of a batch through :func:`as_rgb`; an empty batch is a ``ValueError``."""
    if len(pictures) == 0:
        raise ValueError("got an empty batch of pictures; connect at least one picture")
    return [as_rgb(picture, number) for number, picture in enumerate(pictures, start=1)]


def _to_bytes(array: np.ndarray, number: int) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"picture {number} is of type {array.dtype}; wanted is uint8, or float in [0, 1]")
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ValueError(
            f"picture {number} has {bad} values that are NaN or infinite, so it is no picture; look at the node that "
            "made it (a VAE in half precision often does this: run it with --fp32-vae)"
        )
    return np.rint(np.clip(array, 0.0, 1.0).astype(np.float32) * 255).astype(np.uint8)


def _flatten(array: np.ndarray) -> np.ndarray:
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 3:
        return np.ascontiguousarray(array)
    alpha = array[:, :, 3:].astype(np.float32) / 255
    return np.rint(array[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
