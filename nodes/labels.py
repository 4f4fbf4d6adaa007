"""How previews mark people: a colour for each number, and labels in it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

from PIL import ImageDraw, ImageFont

COLOURS = (
    (232, 84, 60), (58, 138, 232), (70, 186, 88), (236, 184, 46), (164, 92, 214), (48, 190, 196), (240, 120, 180),
    (150, 120, 70),
)  # fmt: skip
GOLDEN_ANGLE = 0.381966  # part of a turn: hues of further people stay far from each other
LONGEST_NAME = 24
SMALLEST_SIDE, LARGEST_SIDE = 512, 1536
"""Pixels of the longer side: small previews are enlarged, so that numbers can be read, and huge ones shrunk."""
LEAST_TEXT = 16
"""Pixels."""

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are outside."""


def colour_of(number: int) -> Colour:
    """The colour of a person, numbers from 0; no two are the same."""
    if number < len(COLOURS):
        return COLOURS[number]
    turn = number * GOLDEN_ANGLE % 1.0
    red, green, blue = colorsys.hsv_to_rgb(turn, 0.55 + 0.3 * (number % 2), 0.9 - 0.2 * (number % 3))
    return round(red * 255), round(green * 255), round(blue * 255)


def label_text(number: int, name: str) -> str:
    """`2 Anna`; the number alone for a name that the built-in font cannot write."""
    writable = name.isascii() or all(letter.isprintable() and ord(letter) < 256 for letter in name)
    short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
    return f"{number + 1} {short}".strip() if writable else str(number + 1)


def chip_box(pen: ImageDraw.ImageDraw, middle: tuple[int, int], text: str, font: Any) -> Box:
    """The label around a middle (x, y), moved inside the picture where it reaches out."""
    ascent, descent = font.getmetrics()
    margin = max(2, (ascent + descent) // 6)
    width, height = round(pen.textlength(text, font=font)) + 2 * margin, ascent + descent + margin // 2
    left = min(max(0, middle[0] - width // 2), max(0, pen.im.size[0] - width))
    top = min(max(0, middle[1] - height // 2), max(0, pen.im.size[1] - height))
    return left, top, left + width, top + height


def draw_chip(pen: ImageDraw.ImageDraw, chip: Box, text: str, colour: Colour, font: Any) -> None:
    """Writes a text on a ground of the person's colour, black or white by what can be read on it."""
    left, top, right, bottom = chip
    ink = (0, 0, 0) if colour[0] * 0.3 + colour[1] * 0.59 + colour[2] * 0.11 > 120 else (255, 255, 255)
    pen.rectangle((left, top, right - 1, bottom - 1), fill=colour, outline=ink)
    pen.text(((left + right) / 2, (top + bottom) / 2), text, fill=ink, font=font, anchor="mm")


def fitting_font(texts: Sequence[str], width: int, height: int) -> Any:
    """The built-in font in the largest size, at most `height` pixels, in which each text fits into `width` pixels."""
    largest = max(LEAST_TEXT, height)
    font = ImageFont.load_default(largest)
    widest = max((font.getlength(text) for text in texts), default=0.0)
    return font if widest <= width else ImageFont.load_default(max(LEAST_TEXT, int(largest * width / widest)))


def readable_scale(height: int, width: int) -> float:
    """What a picture is enlarged by, or shrunk, so that labels on it can be read."""
    longer = max(height, width)
    return min(max(1.0, SMALLEST_SIDE / longer), LARGEST_SIDE / longer)
