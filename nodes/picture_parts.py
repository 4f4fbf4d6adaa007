"""Parts of a picture that are worked on by themselves: which ones, how they are cut out, how they go back.

Legend: B pictures, H W pixels, C channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..attention.grid import LATENT_SCALE, View
from .images import require_image

PartPlace = io.Custom("FUSEDID_PLACE")
"""Carries `Part`."""


@dataclass(frozen=True)
class Part:
    """A rectangle of a picture.

    picture_hw: the picture's size. box: top, left, bottom, right. soft: widths of the borders within which it fades
    out, in the same order. All in pixels of the picture. size_hw: pixels of the part while it is worked on.
    """

    picture_hw: tuple[int, int]
    box: tuple[int, int, int, int]
    soft: tuple[int, int, int, int]
    size_hw: tuple[int, int]

    @property
    def view(self) -> View:
        """The part as fractions of the picture."""
        (height, width), (top, left, bottom, right) = self.picture_hw, self.box
        return top / height, left / width, bottom / height, right / width


def people_parts(masks_IHW: Tensor, picture_hw: tuple[int, int], *, size: int, margin: float) -> list[Part]:
    """A square around everybody's region, in the people's order; cut off where the picture ends.

    Receives: masks `[I, H, W]` of any size. margin: what is added on every side, as a share of the region's longer
    side. Parts are enlarged until their longer side has `size` pixels, and never made smaller.
    """
    height, width = picture_hw
    parts = []
    for mask in masks_IHW:
        region = mask >= mask.amax() / 2
        top, bottom = _scaled(region.any(1).nonzero(), height / mask.shape[0])
        left, right = _scaled(region.any(0).nonzero(), width / mask.shape[1])
        longer = max(bottom - top, right - left)
        side = max(1, round(longer * (1 + 2 * margin)))
        top, bottom = _span((top + bottom) / 2, side, height)
        left, right = _span((left + right) / 2, side, width)
        scale = max(1.0, size / max(bottom - top, right - left))
        fade = round(longer * margin / 2)
        box = (top, left, bottom, right)
        soft = _soft_borders(box, picture_hw, (fade, fade))
        parts.append(Part(picture_hw, box, soft, _latent_size(bottom - top, right - left, scale)))
    return parts


def tile_parts(picture_hw: tuple[int, int], *, size: int, margin: float) -> list[Part]:
    """Tiles with `size` pixels a side that cover the picture row by row and share at least a margin, of their side."""
    overlap = round(size * margin)
    (rows, fade_y), (columns, fade_x) = (_tiles(side, size, overlap) for side in picture_hw)
    parts = []
    for (top, bottom), (left, right) in ((row, column) for row in rows for column in columns):
        box = (top, left, bottom, right)
        soft = _soft_borders(box, picture_hw, (fade_y, fade_x))
        parts.append(Part(picture_hw, box, soft, _latent_size(bottom - top, right - left, 1.0)))
    return parts


def cut_out(image_BHWC: Tensor, part: Part) -> Tensor:
    """The part of a picture, at the size at which it is worked on."""
    top, left, bottom, right = part.box
    return _resized(image_BHWC[:, top:bottom, left:right], part.size_hw)


def put_back(image_BHWC: Tensor, done: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """The picture with its parts `[B, h, w, C]` in place of what they were cut from.

    Where parts share pixels the nearer to a part's middle counts for more; towards its border a part fades into the
    picture. Raises ValueError for parts of a picture of another size.
    """
    require_image(image_BHWC)
    image = image_BHWC.float()
    total, weight = torch.zeros_like(image), torch.zeros_like(image[:1, :, :, :1])
    for number, (part, pixels) in enumerate(done, 1):
        require_image(pixels, f"part {number}")
        if pixels.shape[-1] not in (1, *range(image.shape[-1], 5)) or len(pixels) not in (1, len(image)):
            raise ValueError(
                f"part {number} has {len(pixels)} pictures of {pixels.shape[-1]} channels, the picture that was cut "
                f"{len(image)} of {image.shape[-1]}. Connect what was made of that part alone"
            )
        if part.picture_hw != tuple(image.shape[1:3]):
            raise ValueError(
                f"a part was cut out of a picture of {part.picture_hw[1]} x {part.picture_hw[0]} pixels, this one is "
                f"{image.shape[2]} x {image.shape[1]}. Connect the picture that FusedIDCutPicture got"
            )
        top, left, bottom, right = part.box
        share = _fading(part).to(image)[None, :, :, None]
        small = _resized(pixels[..., : image.shape[-1]].to(image), (bottom - top, right - left))
        total[:, top:bottom, left:right] += small * share
        weight[:, top:bottom, left:right] += share
    covered = weight.clamp_max(1.0)
    return (image * (1 - covered) + total * (covered / weight.clamp_min(1e-6))).clamp(0.0, 1.0)


def _scaled(indices: Tensor, scale: float) -> tuple[int, int]:
    return math.floor(int(indices[0]) * scale), math.ceil((int(indices[-1]) + 1) * scale)


def _span(middle: float, side: int, most: int) -> tuple[int, int]:
    """`side` pixels around a middle, moved into the picture."""
    side = min(side, most)
    start = min(max(round(middle - side / 2), 0), most - side)
    return start, start + side


def _latent_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Whole latent pixels: the VAE cuts off what is left over, and everything would move."""
    rows, columns = (max(1, round(side * scale / LATENT_SCALE)) * LATENT_SCALE for side in (height, width))
    return rows, columns


def _tiles(side: int, size: int, overlap: int) -> tuple[list[tuple[int, int]], int]:
    """Borders of the fewest tiles that cover a side, evenly, and what neighbours share."""
    if side <= size:
        return [(0, side)], 0
    count = math.ceil((side - overlap) / (size - overlap))
    starts = [round(i * (side - size) / (count - 1) / LATENT_SCALE) * LATENT_SCALE for i in range(count - 1)]
    starts.append(side - size)
    return [(start, start + size) for start in starts], min(a + size - b for a, b in itertools.pairwise(starts))


def _soft_borders(
    box: tuple[int, int, int, int], picture_hw: tuple[int, int], fade_yx: tuple[int, int]
) -> tuple[int, int, int, int]:
    """No border fades at the picture's own."""
    top, left, bottom, right = box
    fade_y, fade_x = fade_yx
    return (
        fade_y if top > 0 else 0, fade_x if left > 0 else 0,
        fade_y if bottom < picture_hw[0] else 0, fade_x if right < picture_hw[1] else 0,
    )  # fmt: skip


def _fading(part: Part) -> Tensor:
    """Weights `[H, W]` of a part: 1, falling linearly within its soft borders."""
    top, left, bottom, right = part.box
    return _ramp(bottom - top, part.soft[0], part.soft[2])[:, None] * _ramp(right - left, part.soft[1], part.soft[3])


def _ramp(length: int, first: int, last: int) -> Tensor:
    position = torch.arange(length) + 0.5
    ramp = torch.ones(length)
    if first:
        ramp = torch.minimum(ramp, position / first)
    if last:
        ramp = torch.minimum(ramp, (length - position) / last)
    return ramp


def _resized(image_BHWC: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if tuple(image_BHWC.shape[1:3]) == size_hw:
        return image_BHWC
    resized = F.interpolate(image_BHWC.float().movedim(-1, 1), size=size_hw, mode="bicubic", antialias=True)
    return resized.movedim(1, -1).clamp(0.0, 1.0)
