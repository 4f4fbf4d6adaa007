"""A picture beside the faces it was compared with: frames and scores in each person's colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..faces.encoder import Face
from ..faces.identity import Identity, embedded_references
from ..faces.similarity import PictureScore
from .labels import LEAST_TEXT, Box, Colour, chip_box, colour_of, draw_chip, fitting_font, label_text, readable_scale

GROUND = (24, 24, 24)
NOBODY = (170, 170, 170)
TILE = 0.4
"""Longest side of a reference in parts of the picture's longer side."""
TEXT, FACE_TEXT = 1 / 36, 0.18
"""Largest writing in parts of the longer side, and of a face's height."""


def draw_comparison(picture: np.ndarray, score: PictureScore, people: Sequence[Identity]) -> np.ndarray:
    """uint8 `[H', W', 3]`: the references in a column, the picture uint8 `[H, W, 3]` to the right of it.

    A face that was taken for a person has the person's colour, number and cosine; another one is grey, with the cosine
    to the person it is most like. Pictures of one size give results of one size, 512 to 1536 pixels without the column.
    """
    scale = readable_scale(*picture.shape[:2])
    width, height = (max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0]))
    line = max(LEAST_TEXT, round(TEXT * max(width, height)))
    caption = round(1.5 * line)
    tile = max(4 * LEAST_TEXT, min(round(TILE * max(width, height)), height // len(people) - caption))
    sheet = Image.new("RGB", (tile + width, max(height, len(people) * (tile + caption))), GROUND)
    sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), (tile, 0))
    pen = ImageDraw.Draw(sheet)
    for number, person in enumerate(people):
        top = number * (tile + caption)
        sheet.paste(Image.fromarray(_shown_crop(person)).resize((tile, tile), Image.Resampling.LANCZOS), (0, top))
        text, font = _caption(number, person.name, _score_of(score, number), tile - line // 2, line)
        draw_chip(pen, (0, top + tile, tile, top + tile + caption), text, colour_of(number), font)
    _frame_faces(pen, score, (tile, 0, tile + width, height), scale)
    return np.asarray(sheet)


def _shown_crop(person: Identity) -> np.ndarray:
    """The reference that weighs most among those with a face."""
    return max(embedded_references(person), key=lambda reference: reference.weight).crop


def _caption(number: int, name: str, verdict: str, width: int, height: int) -> tuple[str, Any]:
    """Number, name and score with a font in which they fit; without the name where it does not fit at all."""
    for text in (f"{label_text(number, name)}: {verdict}", f"{number + 1}: {verdict}"):
        font = fitting_font([text], width, height)
        if font.getlength(text) <= width:
            break
    return text, font


def _score_of(score: PictureScore, number: int) -> str:
    return "not found" if score.chosen[number] is None else f"{score.cosines[number]:.2f}"


def _frame_faces(pen: ImageDraw.ImageDraw, score: PictureScore, place: Box, scale: float) -> None:
    line = max(2, round((place[2] - place[0]) / 256))
    labels = []
    for index, face in enumerate(score.faces):
        text, colour = _verdict(score, index)
        box = _on_sheet(face, place, scale)
        pen.rectangle(box, outline=colour, width=line)
        labels.append((box, text, colour))
    for box, text, colour in labels:  # after all frames, so that none runs through a number
        largest = TEXT * max(place[2] - place[0], place[3])
        font = ImageFont.load_default(max(LEAST_TEXT, round(min(FACE_TEXT * (box[3] - box[1]), largest))))
        _label_above(pen, box, text, colour, font, place)


def _verdict(score: PictureScore, face: int) -> tuple[str, Colour]:
    if face in score.chosen:
        person = score.chosen.index(face)
        return f"{person + 1}: {score.cosines[person]:.2f}", colour_of(person)
    nearest = int(score.table[:, face].argmax())
    return f"{nearest + 1}? {score.table[nearest, face]:.2f}", NOBODY


def _on_sheet(face: Face, place: Box, scale: float) -> Box:
    x0, y0, x1, y1 = (round(scale * value) for value in face.box)
    left, top = min(max(place[0], place[0] + x0), place[2] - 2), min(max(0, y0), place[3] - 2)
    return left, top, max(left + 1, min(place[0] + x1, place[2] - 1)), max(top + 1, min(y1, place[3] - 1))


def _label_above(pen: ImageDraw.ImageDraw, box: Box, text: str, colour: Colour, font: Any, place: Box) -> None:
    """Above the frame, so that the face stays visible; below it where there is no room."""
    left, top, right, bottom = chip_box(pen, (0, 0), text, font)
    width, height = right - left, bottom - top
    x = min(max(place[0], box[0]), max(place[0], place[2] - width))
    y = box[1] - height if box[1] >= height else min(box[3], place[3] - height)
    draw_chip(pen, (x, y, x + width, y + height), text, colour, font)
