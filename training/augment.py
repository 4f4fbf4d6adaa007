"""Pictures on their way into a sample: square, flip, crop and colour jitter (METHOD 1.5).

Pictures are uint8 `[H, W, 3]` RGB arrays.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import AugmentConfig
from .randomness import uniform, whole


def square(picture: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square, scaled to `size`; a picture that already has that size is returned as it is."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return scaled(picture[top : top + side, left : left + side], size)


def scaled(picture: np.ndarray, size: int) -> np.ndarray:
    """A square picture at another size (Lanczos)."""
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


def augmented_reference(picture: np.ndarray, options: AugmentConfig, gen: torch.Generator) -> np.ndarray:
    """A square reference after crop, flip and colour jitter. Any options read the generator equally often."""
    cut, at_y, at_x, flip, *color = (uniform(gen) for _ in range(7))
    picture = _cropped(picture, cut * options.crop, at_y, at_x)
    if flip < options.flip:
        picture = picture[:, ::-1]
    return _recolored(picture, [1 + (2 * u - 1) * options.color for u in color])


def _cropped(picture: np.ndarray, share: float, at_y: float, at_x: float) -> np.ndarray:
    size = picture.shape[0]
    margin = int(size * share)
    top, left, side = int(at_y * (margin + 1)), int(at_x * (margin + 1)), size - margin
    return scaled(picture[top : top + side, left : left + side], size)


def _recolored(picture: np.ndarray, factors: list[float]) -> np.ndarray:
    """Brightness, contrast and saturation as factors near 1."""
    brightness, contrast, saturation = factors
    x = picture.astype(np.float32) * brightness
    x = (x - x.mean()) * contrast + x.mean()
    grey = x @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    x = (x - grey[..., None]) * saturation + grey[..., None]
    return np.rint(x).clip(0, 255).astype(np.uint8)


def flipped(picture: np.ndarray, probability: float, gen: torch.Generator) -> np.ndarray:
    """The picture, mirrored with the given probability."""
    return picture[:, ::-1] if uniform(gen) < probability else picture


def to_rgb_pm1(picture: np.ndarray) -> Tensor:
    """uint8 `[H, W, 3]` -> float32 `[3, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def to_rgb01(picture: np.ndarray) -> Tensor:
    """uint8 `[H, W, 3]` -> float32 `[H, W, 3]` in [0, 1]."""
    return torch.from_numpy(np.array(picture)).float() / 255.0


def pick(choices: list[int], gen: torch.Generator) -> int:
    """One of the choices, each equally likely."""
    return choices[whole(gen, len(choices))]
