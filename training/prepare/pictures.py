"""Pictures for the report: contact sheets and histograms, drawn with Pillow alone."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL = 160, 6, 16
BACKGROUND, INK, BAR, GRID = (250, 250, 250), (40, 40, 40), (66, 110, 180), (220, 220, 220)
CHART = (360, 220)
BINS = 30


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of thumbnails, each with a line of text above."""
    columns = max((len(pictures) for _, pictures in rows), default=1)
    height = LABEL + CELL + GAP
    sheet = Image.new("RGB", (GAP + max(columns, 3) * (CELL + GAP), GAP + len(rows) * height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (label, pictures) in enumerate(rows):
        top = GAP + number * height
        draw.text((GAP, top), label, fill=INK, font=_font(12))
        for column, picture in enumerate(pictures):
            sheet.paste(fit(picture), (GAP + column * (CELL + GAP), top + LABEL))
    return sheet


def fit(picture: Image.Image) -> Image.Image:
    """A square thumbnail with the whole picture in its middle."""
    small = picture.convert("RGB")
    small.thumbnail((CELL, CELL))
    cell = Image.new("RGB", (CELL, CELL), GRID)
    cell.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return cell


def outlined(picture: Image.Image, face_box: Sequence[float] | None, mask: Image.Image | None) -> Image.Image:
    """A packed target with its mask tinted and its face box drawn, to check both by eye."""
    shown = picture.convert("RGB")
    if mask is not None:
        tinted = Image.blend(shown, Image.new("RGB", shown.size, (230, 60, 60)), 0.35)
        shown = Image.composite(tinted, shown, mask)
    if face_box:
        width = max(2, shown.width // 120)
        ImageDraw.Draw(shown).rectangle([float(value) for value in face_box], outline=(40, 220, 90), width=width)
    return shown


def histogram(title: str, values: np.ndarray) -> Image.Image:
    """A bar chart of finite values with its range, median and 5 % and 95 % quantiles in words."""
    chart = Image.new("RGB", CHART, BACKGROUND)
    draw = ImageDraw.Draw(chart)
    draw.text((8, 4), title, fill=INK, font=_font(13))
    values = values[np.isfinite(values)].astype(np.float64)
    if not len(values):
        draw.text((8, 24), "no values", fill=INK, font=_font(12))
        return chart
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    draw.text((8, 22), f"5 %: {low:.4g}   median: {middle:.4g}   95 %: {high:.4g}", fill=INK, font=_font(11))
    counts, edges = np.histogram(values, bins=BINS)
    left, right, top, bottom = 12, CHART[0] - 12, 44, CHART[1] - 22
    step = (right - left) / BINS
    for number, count in enumerate(counts):
        height = (bottom - top) * count / counts.max()
        draw.rectangle([left + number * step, bottom - height, left + (number + 1) * step - 1, bottom], fill=BAR)
    draw.line([left, bottom, right, bottom], fill=INK)
    draw.text((left, bottom + 4), f"{edges[0]:.4g}", fill=INK, font=_font(11))
    draw.text((right, bottom + 4), f"{edges[-1]:.4g}", fill=INK, font=_font(11), anchor="ra")
    return chart


def tiled(charts: Sequence[Image.Image], columns: int = 3) -> Image.Image:
    """Charts of equal size in rows."""
    lines = -(-len(charts) // columns)
    sheet = Image.new("RGB", (CHART[0] * columns, CHART[1] * max(1, lines)), BACKGROUND)
    for number, chart in enumerate(charts):
        sheet.paste(chart, (number % columns * CHART[0], number // columns * CHART[1]))
    return sheet


def encoded(picture: Image.Image, kind: str) -> bytes:
    """``JPEG`` or ``PNG`` bytes."""
    sink = io.BytesIO()
    picture.save(sink, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return sink.getvalue()


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
