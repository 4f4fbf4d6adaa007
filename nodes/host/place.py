"""Which part of the whole picture some rows of a UNet call show, and what masks look like there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...attention.grid import View, seen_elsewhere, view_masks
from .prompts import Area

VIEW = "fusedid_view"
"""Where a call's transformer_options hold the `View` that the latent shows, or one per row; absent: all of it."""


class Place(NamedTuple):
    """latent_hw: size of the latent that is sampled. view: its part of the picture. area: the rows' part of it."""

    latent_hw: tuple[int, int]
    view: View | None = None
    area: Area | None = None

    @property
    def shown(self) -> View | None:
        """The rows' part of the whole picture; None for all of it."""
        if self.area is None:
            return self.view
        height, width, y, x = self.area
        rows, columns = self.latent_hw
        top, left, bottom, right = self.view or (0.0, 0.0, 1.0, 1.0)
        tall, wide = (bottom - top) / rows, (right - left) / columns
        return top + y * tall, left + x * wide, top + (y + height) * tall, left + (x + width) * wide

    def masks(self, masks_IHW: Tensor) -> Tensor:
        """What image-space masks `[I, H, W]` of the whole picture are in this part of it."""
        return masks_IHW if self.shown is None else view_masks(masks_IHW, self.shown)

    def elsewhere(self, masks_IHW: Tensor) -> Tensor | None:
        """Whose mask goes on outside this part: bool `[I]`, or None where nothing is outside."""
        return None if self.shown is None else seen_elsewhere(masks_IHW, self.shown)


def within(area: Area | None, size_hw: tuple[int, int], outer: Area | None) -> Area | None:
    """An area of a part (None: all of it, `size_hw`) as an area of what the part was cut from."""
    if outer is None:
        return area
    height, width, y, x = area or (*size_hw, 0, 0)
    return height, width, y + outer[2], x + outer[3]


def find_part(part: Tensor, whole: Tensor) -> Area | None:
    """Where latents `[B, C, h, w]` were cut out of others `[B, C, H, W]`; None when they were not, or it is unclear.

    For nodes that evaluate a part and tell nobody. Waits for the device.
    """
    height, width = part.shape[-2:]
    if part.shape[:2] != whole.shape[:2] or height > whole.shape[-2] or width > whole.shape[-1]:
        return None
    rows, columns = whole.shape[-2] - height + 1, whole.shape[-1] - width + 1
    corner = (whole[0, :, :rows, :columns] == part[0, :, :1, :1]).all(0)
    places = corner.nonzero().tolist()
    found = [(y, x) for y, x in places if torch.equal(whole[..., y : y + height, x : x + width], part)]
    return (height, width, *found[0]) if len(found) == 1 else None
