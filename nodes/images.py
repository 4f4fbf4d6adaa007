"""The gate between ComfyUI's IMAGE (float `[B, H, W, C]` in [0, 1]) and the arrays of `faces/` (uint8 `[H, W, 3]`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..faces.identity import Identity
from ..faces.pictures import as_rgb_batch

STRIP_SIDE = 256


def image_to_pictures(image: Tensor) -> list[np.ndarray]:
    """IMAGE `[B, H, W, 1|3|4]` in [0, 1] as B arrays uint8 `[H, W, 3]`. ValueError for NaN, empty or tiny pictures."""
    if image.ndim != 4:
        raise ValueError(f"got an image of the shape {list(image.shape)}; wanted is [batch, height, width, channels]")
    return as_rgb_batch(list(image.detach().cpu().float().numpy()))


def pictures_to_image(pictures: Sequence[np.ndarray]) -> Tensor:
    """Arrays uint8 `[H, W, 3]` of one size as IMAGE float32 `[B, H, W, 3]` in [0, 1]."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 255)


def identity_strip(identity: Identity) -> Tensor:
    """The identity's reference crops as IMAGE `[references, 256, 256, 3]`."""
    side = (STRIP_SIDE, STRIP_SIDE)
    crops = [Image.fromarray(ref.crop).resize(side, Image.Resampling.LANCZOS) for ref in identity.references]
    return pictures_to_image([np.asarray(crop) for crop in crops])


def require_image(image: Tensor, name: str = "image") -> None:
    """Raises ValueError unless it is `[B, H, W, C]` with something in it."""
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"{name} has the shape {list(image.shape)}; wanted is [batch, height, width, channels]")
