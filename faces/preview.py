"""Numbered boxes on the photo, so that a user sees which face has which number and which one is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .encoder import Face

USED = (64, 220, 96)
OTHER = (255, 176, 32)
INK = (0, 0, 0)
SMALLEST_TEXT = 12


def draw_faces(
    image: np.ndarray, faces: Sequence[Face], order: Sequence[int] | Mapping[int, str], used: int | None
) -> np.ndarray:
    """uint8 ``[H, W, 3]`` with a box around each face, numbered from 1 in ``order``; the used one is green.

    ``order`` may also be a text per face index. Faces that are not in it get a box without a label.
    """
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(max(image.shape[:2]) / 320))
    texts = order if isinstance(order, Mapping) else {index: str(n) for n, index in enumerate(order, start=1)}
    # The used face is drawn last so that no neighbour's box covers it.
    for index in sorted(range(len(faces)), key=lambda index: index == used):
        colour = USED if index == used else OTHER
        pen.rectangle(_clipped(faces[index], image), outline=colour, width=line)
        if index in texts:
            _label(pen, faces[index], texts[index], colour, image, line)
    return np.asarray(canvas)


def _clipped(face: Face, image: np.ndarray) -> tuple[float, float, float, float]:
    height, width = image.shape[:2]
    x0, y0, x1, y1 = face.box
    left, top = min(max(x0, 0), width - 2), min(max(y0, 0), height - 2)
    return left, top, max(left + 1, min(x1, width - 1)), max(top + 1, min(y1, height - 1))


def _label(
    pen: ImageDraw.ImageDraw, face: Face, text: str, colour: tuple[int, int, int], image: np.ndarray, line: int
) -> None:
    size = max(SMALLEST_TEXT, round(min(face.height * 0.4, max(image.shape[:2]) / 24)))
    font = ImageFont.load_default(size)
    left, top, _, bottom = _clipped(face, image)
    text_width, text_height = pen.textbbox((0, 0), text, font=font)[2:]
    box_width, box_height = text_width + 2 * line, text_height + 2 * line
    # Above the box, so that it does not hide the face; below it where there is no room.
    y = top - box_height if top >= box_height else min(bottom, image.shape[0] - box_height)
    pen.rectangle((left, y, left + box_width, y + box_height), fill=colour)
    pen.text((left + line, y + line), text, fill=INK, font=font)
