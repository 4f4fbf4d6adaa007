"""The picture of who is where: every region in its colour, with the person's number and name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .labels import LEAST_TEXT, Box, Colour, chip_box, colour_of, draw_chip, label_text, readable_scale

COLOURING = 0.5
EMPTY = 36
"""Grey of the ground where there is no picture."""
EMPTY_SIDE = 512
SMALLEST_TEXT, LARGEST_TEXT = 1 / 48, 1 / 24
"""Height of the writing in parts of the longer side."""
GLIMPSE = 256
"""Longer side of the copy of a region in which its middle is searched."""
ROOM_FOR_NAME = 2.8
"""A name is written when its label is at most this many radii of its region wide; else the number alone."""


def draw_routing(
    masks: Sequence[np.ndarray | None], names: Sequence[str], picture: np.ndarray | None = None
) -> np.ndarray:
    """uint8 `[H, W, 3]`: masks `[h, w]` in [0, 1] laid over a picture or over grey, numbered in their order.

    People whose mask is None are listed in the upper left corner. The masks and the picture show the same thing; the
    result has the picture's size, or else the masks', with 512 to 1536 pixels on the longer side.
    """
    canvas = _ground(masks, picture)
    size = (canvas.shape[1], canvas.shape[0])
    drawn = [None if mask is None else _fitted(mask, size) for mask in masks]
    for number, mask in enumerate(drawn):
        if mask is not None:
            _tint(canvas, mask, colour_of(number))
    image = Image.fromarray(canvas.round().astype(np.uint8))
    pen = ImageDraw.Draw(image)
    taken: list[Box] = []
    for number, (mask, name) in enumerate(zip(drawn, names, strict=True)):
        if mask is not None:
            taken.append(_label_region(pen, mask, number, name, taken))
    _list_waiting(pen, [(number, names[number]) for number, mask in enumerate(drawn) if mask is None])
    return np.asarray(image)


def _ground(masks: Sequence[np.ndarray | None], picture: np.ndarray | None) -> np.ndarray:
    shapes = [mask.shape for mask in masks if mask is not None]
    height, width = picture.shape[:2] if picture is not None else shapes[0] if shapes else (EMPTY_SIDE, EMPTY_SIDE)
    scale = readable_scale(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if picture is None:
        return np.full((size[1], size[0], 3), EMPTY, dtype=np.float32)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def _fitted(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if mask.shape == (size[1], size[0]):
        return mask
    return np.asarray(Image.fromarray(np.asarray(mask, dtype=np.float32)).resize(size, Image.Resampling.NEAREST))


def _tint(canvas: np.ndarray, mask: np.ndarray, colour: Colour) -> None:
    """Blends one colour in, in place, inside the mask's bounding box only."""
    box = _bounding_box(mask > 0)
    share = COLOURING * mask[box][..., None]
    canvas[box] += share * (np.array(colour, dtype=np.float32) - canvas[box])


def _label_region(pen: ImageDraw.ImageDraw, mask: np.ndarray, number: int, name: str, taken: Sequence[Box]) -> Box:
    """Number and, where there is room, name across the region's lower end, so that a face above stays visible."""
    inside = mask >= 0.5 * mask.max()
    box = _bounding_box(inside)
    x, y, radius = _middle(inside[box])
    x, y = x + box[1].start, y + box[0].start
    column = inside[y:, x]
    bottom = y + (len(column) if column.all() else int(np.argmin(column)))
    font = ImageFont.load_default(_text_size(radius, max(mask.shape)))
    text = label_text(number, name)
    chip = chip_box(pen, (x, bottom), text, font)
    if chip[2] - chip[0] > ROOM_FOR_NAME * radius or any(_meet(chip, other) for other in taken):
        text = str(number + 1)
        chip = chip_box(pen, (x, bottom), text, font)
    draw_chip(pen, chip, text, colour_of(number), font)
    return chip


def _middle(inside: np.ndarray) -> tuple[int, int, float]:
    """(x, y) of the pixel that is farthest from the region's edge, and that distance."""
    from scipy.ndimage import distance_transform_edt

    step = max(1, max(inside.shape) // GLIMPSE)
    glimpse = inside[::step, ::step]
    if not glimpse.any():  # thinner than a step
        rows, columns = np.nonzero(inside)
        return int(columns[len(columns) // 2]), int(rows[len(rows) // 2]), 1.0
    depth = distance_transform_edt(np.pad(glimpse, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(column) * step, int(row) * step, float(depth.max()) * step


def _bounding_box(inside: np.ndarray) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _text_size(radius: float, longer_side: int) -> int:
    return max(LEAST_TEXT, round(min(max(0.5 * radius, SMALLEST_TEXT * longer_side), LARGEST_TEXT * longer_side)))


def _list_waiting(pen: ImageDraw.ImageDraw, waiting: Sequence[tuple[int, str]]) -> None:
    font = ImageFont.load_default(round(max(pen.im.size) / 24))
    top = 0
    for number, name in waiting:
        text = f"{label_text(number, name)}: no place yet"
        chip = chip_box(pen, (0, top), text, font)
        chip = (chip[0], top, chip[2], top + chip[3] - chip[1])
        draw_chip(pen, chip, text, colour_of(number), font)
        top = chip[3]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
