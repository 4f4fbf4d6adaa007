"""Hiding faces in the style image, so that style says nothing about identity (METHOD 2.5).

Training and the node use these functions, because the Linear has to see the same hole in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP_MEAN_RGB = (0.48145466, 0.4578275, 0.40821073)  # what CLIP's preprocessing turns into zero
FACE_GROWTH = 1.3  # a detector's box ends at chin and brow; the hidden ellipse also covers forehead and jaw


def face_region(boxes_N4: Tensor, height: int, width: int, *, growth: float = FACE_GROWTH) -> Tensor:
    """Mask `[H, W]` of ones inside the ellipses around faces, zeros elsewhere.

    Receives: boxes `[N, 4]` as (x0, y0, x1, y1) in pixels; an ellipse has `growth` times the box's axes.
    """
    y = torch.arange(height, dtype=torch.float32)[:, None] + 0.5
    x = torch.arange(width, dtype=torch.float32)[None, :] + 0.5
    region = torch.zeros(height, width)
    for x0, y0, x1, y1 in boxes_N4.float().tolist():
        across, down = (x1 - x0) / 2 * growth, (y1 - y0) / 2 * growth
        inside = ((x - (x0 + x1) / 2) / across) ** 2 + ((y - (y0 + y1) / 2) / down) ** 2 <= 1.0
        region = torch.maximum(region, inside.float())
    return region


def hide_region(images_BHWC: Tensor, region_BHW: Tensor) -> Tensor:
    """Images `[B, H, W, 3]` in [0, 1] with CLIP's mean colour where the region is 1; soft regions blend."""
    region = region_BHW.to(images_BHWC).clamp(0.0, 1.0)[..., None]
    return images_BHWC * (1.0 - region) + images_BHWC.new_tensor(CLIP_MEAN_RGB) * region
