"""Pictures side by side: a line per person (or group), the reference first, then one column per row of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .drawing import read_drawn
from .plan import Job

HEIGHT = 128
"""Of every picture in the grid, pixels."""
LINES = 8
"""People shown at most."""
TEXT = 11
GROUND, INK = (255, 255, 255), (0, 0, 0)


def write_grids(folder: Path, jobs: Mapping[str, Sequence[Job]]) -> list[str]:
    """One PNG per number of people in a picture, first prompt and first seed; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for people in sorted({len(job.meant) for some in jobs.values() for job in some}):
        chosen = {name: some for name, some in jobs.items() if len(some[0].meant) == people}
        name = f"pictures_{people}.png"
        grid(chosen).save(folder / name)
        names.append(name)
    return names


def grid(jobs: Mapping[str, Sequence[Job]]) -> Image.Image:
    """References and the rows' pictures. Every row's first picture of a unit is shown; a missing one stays empty."""
    first = {name: _first_of_units(some) for name, some in jobs.items()}
    units = sorted({unit for some in first.values() for unit in some})[:LINES]
    people = {unit: some[unit].meant for unit in units for some in first.values() if unit in some}
    lines = []
    for unit in units:
        faces = [_sized(one.photos[0].crop) for one in people[unit]]
        drawn = [_sized(read_drawn(some[unit])) if unit in some else None for some in first.values()]
        lines.append([np.concatenate(faces, axis=1), *drawn])
    widths = [max(cell.shape[1] for cell in column if cell is not None) for column in zip(*lines)]
    return _pasted(lines, widths, ["reference", *first])


def _first_of_units(jobs: Sequence[Job]) -> dict[int, Job]:
    found: dict[int, Job] = {}
    for job in jobs:
        found.setdefault(job.unit, job)
    return found


def _pasted(lines: Sequence[Sequence[np.ndarray | None]], widths: Sequence[int], names: Sequence[str]) -> Image.Image:
    font = ImageFont.load_default(TEXT)
    labels = [_wrapped(name, width, font) for name, width in zip(names, widths)]
    top = (TEXT + 4) * max(label.count("\n") + 1 for label in labels) + 4
    sheet = Image.new("RGB", (sum(widths) + 4 * (len(widths) - 1), top + (HEIGHT + 4) * len(lines)), GROUND)
    pen = ImageDraw.Draw(sheet)
    left = 0
    for column, (label, width) in enumerate(zip(labels, widths)):
        pen.multiline_text((left, 2), label, fill=INK, font=font)
        for number, line in enumerate(lines):
            cell = line[column]
            if cell is not None:
                sheet.paste(Image.fromarray(cell), (left, top + number * (HEIGHT + 4)))
        left += width + 4
    return sheet


def _sized(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    size = (max(1, round(width * HEIGHT / height)), HEIGHT)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _wrapped(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
