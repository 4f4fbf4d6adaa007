"""From masks as users give them to regions that no two people share (METHOD 1.4).

Legend: I identities, H W pixels of the masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.routing import Overlap, resolve_overlaps

HALF = 0.5
SHAPE_TOLERANCE = 0.02
"""Sides may be off by this part and still show the same picture: photos are cut to multiples of 8 on their way."""


def given_mask(mask: Tensor) -> Tensor:
    """One MASK `[H, W]`, `[1, H, W]` or `[1, 1, H, W]` as `[H, W]` in [0, 1].

    Raises ValueError for a batch of several, an empty or all-zero mask, NaN or infinity.
    """
    if mask.ndim < 2 or 0 in mask.shape:
        raise ValueError(f"got a mask of the shape {list(mask.shape)}; wanted is one mask [1, height, width]")
    flat = mask.detach().float().cpu().reshape(-1, *mask.shape[-2:])
    if len(flat) > 1:
        raise ValueError(
            f"got a batch of {len(flat)} masks for one person; wanted is one. Chain one router per person and give "
            "each its own mask, or join the batch into one mask before"
        )
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("the mask holds NaN or infinite values; draw it again or pass it through a threshold")
    if float(flat.amax()) <= 0:
        raise ValueError(
            f"the mask ({_size(flat[0])}) is empty: this person would appear nowhere. Paint the person's region white; "
            "LoadImage gives an empty mask for a picture nothing was painted on"
        )
    return flat[0].clamp(0.0, 1.0)


def at_one_size(masks: Sequence[Tensor]) -> Tensor:
    """Masks `[H, W]` of one shape but different sizes as `[I, H, W]` at the size of the largest.

    Raises ValueError when their shapes (width to height) differ: they cannot show the same picture.
    """
    largest = max(masks, key=lambda mask: mask.numel())
    for mask in masks:
        if not same_shape(tuple(mask.shape), tuple(largest.shape)):
            raise ValueError(
                f"one mask is {_size(mask)}, another {_size(largest)}: these shapes cannot show the same picture. Give "
                "every mask the picture's proportions; the number of pixels may differ"
            )
    size = tuple(largest.shape)
    return torch.stack([mask if tuple(mask.shape) == size else _resized(mask, size) for mask in masks])


def same_shape(a_hw: tuple[int, ...], b_hw: tuple[int, ...]) -> bool:
    """Whether two sizes (height, width) have the same proportions, up to a pixel or 2 %."""
    small, large = sorted((a_hw, b_hw))
    wanted = small[0] * large[1] / large[0]  # the width that goes with the smaller height
    return abs(small[1] - wanted) <= max(1.0, SHAPE_TOLERANCE * small[1])


def resolved_masks(masks_IHW: Tensor, *, overlap: Overlap, feather: int) -> Tensor:
    """Regions of which no two share a pixel's full weight, their sum at most 1 everywhere.

    Receives: masks `[I, H, W]` in [0, 1]; the overlap rule; the border's half width in pixels. Without feather the
    result is zeros and ones (grey counts from one half on); with it grey stays grey and borders run linearly from one
    person to the next. Overlaps are decided before borders are softened: neighbours then always add up to 1.
    Raises ValueError when a person is left with nothing.
    """
    if feather == 0:
        return _hard(masks_IHW, overlap)
    return _box_blurred(resolve_overlaps(masks_IHW, overlap), feather)


def _hard(masks_IHW: Tensor, overlap: Overlap) -> Tensor:
    for number, mask in enumerate(masks_IHW, start=1):
        if float(mask.amax()) < HALF:
            raise ValueError(
                f"the mask of person {number} reaches {float(mask.amax()):.2f} at most, and without feather only "
                f"values from {HALF} on count. Paint it white, or set feather above 0"
            )
    claims = torch.where(masks_IHW >= HALF, masks_IHW, 0.0)
    hard = (resolve_overlaps(claims, overlap) > 0).float()
    # Two values of exactly one half do not exceed 1 together, so only a second look sees them as an overlap.
    return hard if float(hard.sum(0).amax()) <= 1 else resolve_overlaps(hard, overlap)


def _box_blurred(masks_IHW: Tensor, radius: int) -> Tensor:
    """Mean over a square of `2 radius + 1` pixels, cut off at the picture's border; rows, then columns."""
    side = 2 * radius + 1
    rows = F.avg_pool2d(masks_IHW[None], (side, 1), 1, (radius, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, side), 1, (0, radius), count_include_pad=False)[0].clamp(0.0, 1.0)


def _resized(mask_HW: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(mask_HW[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def _size(mask_HW: Tensor) -> str:
    return f"{mask_HW.shape[1]} x {mask_HW.shape[0]}"
