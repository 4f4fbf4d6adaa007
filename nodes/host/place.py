"""Which part of the whole picture some rows of a UNet call show, and what masks look like there."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...attention.grid import crop_masks, view_masks
from .prompts import Area

View = tuple[float, float, float, float]
"""(top, left, bottom, right) as fractions of the whole picture."""
VIEW = "fusedid_view"
"""Where a call's transformer_options hold the `View` that the latent shows; absent: the whole picture."""


class Place(NamedTuple):
    """latent_hw: size of the latent that is sampled. view: its part of the picture. area: the rows' part of it."""

    latent_hw: tuple[int, int]
    view: View | None = None
    area: Area | None = None

    @property
    def everything(self) -> bool:
        """Whether the rows show the whole picture."""
        return self.view is None and self.area is None

    def masks(self, masks_IHW: Tensor) -> Tensor:
        """What image-space masks `[I, H, W]` of the whole picture are in this part of it."""
        if self.view is not None:
            masks_IHW = view_masks(masks_IHW, self.view)
        return masks_IHW if self.area is None else crop_masks(masks_IHW, self.latent_hw, self.area)
