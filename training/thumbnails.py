"""What a miniature base is conditioned on: a thumbnail of the picture, as tokens that say where and which colour.

A base that was only ever unconditional has cross-attention that never learned to look anywhere or to use what it finds,
so METHOD 1.5, which trains keys and values alone, has nothing to work with. SD1.5 learned both from text; a miniature
learns both from a thumbnail of random size (as super-resolution models do), and without one in a share of its samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

FREQUENCIES = 8
PLACE = 4 * FREQUENCIES
PATCH = 2
COLORS = 3 * PATCH**2
GRID = 16
SIDES = (8, 16, 32)
"""Pixels a side of the thumbnails in training; the largest has one token for every two pixels."""


def place_code(height: int, width: int) -> Tensor:
    """Cosines and sines of row and column, `[height * width, PLACE]`: near places have like codes.

    Rows and columns count from 0 at one edge to 1 at the other, so grids of different size agree about a place. The
    edges are half of the longest period apart, so that they differ most.
    """
    codes = []
    for index, size in ((0, height), (1, width)):
        places = torch.arange(height * width)
        at = (places // width if index == 0 else places % width) + 0.5
        angles = at[:, None] * torch.arange(1, FREQUENCIES + 1) * math.pi / size
        codes += [angles.cos(), angles.sin()]
    return torch.cat(codes, dim=1)


def thumbnail_tokens(pixels: Tensor, sides: Sequence[int], width: int, grid: tuple[int, int] = (GRID, GRID)) -> Tensor:
    """Thumbnails of pixels `[B, 3, H, W]` in [-1, 1] -> `[B, h * w, width]`: place, the colours of 2x2 pixels, zeros.

    `sides[b]` is the thumbnail's side in pixels; 0 is no thumbnail: zeros everywhere, which is what the silent text
    encoder says. Raises ValueError for a width that cannot hold a token.
    """
    if width < PLACE + COLORS:
        raise ValueError(f"a context {width} numbers wide cannot hold a thumbnail's {PLACE + COLORS}")
    height_width = (PATCH * grid[0], PATCH * grid[1])
    tokens = pixels.new_zeros(len(pixels), grid[0] * grid[1], width)
    code = place_code(*grid).to(pixels)
    for row, side in enumerate(sides):
        if side == 0:
            continue
        small = interpolate(pixels[row : row + 1], size=(side, side), mode="area")
        shown = interpolate(small, size=height_width, mode="bilinear", align_corners=False)
        patches = torch.nn.functional.unfold(shown, PATCH, stride=PATCH)[0].T  # [h * w, COLORS]
        tokens[row, :, :PLACE], tokens[row, :, PLACE : PLACE + COLORS] = code, patches
    return tokens
