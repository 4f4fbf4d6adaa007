"""The picture of who was looked at: shares of attention in each person's colour, with a legend below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .labels import LEAST_TEXT, colour_of, fitting_font, label_text, readable_scale

LINE = 1 / 36
"""Height of a line of the legend in parts of the picture's longer side."""
GROUND, WRITING = (24, 24, 24), (235, 235, 235)
LUMA = (0.299, 0.587, 0.114)

Person = tuple[int, str, np.ndarray]
"""Number from 0, name, and the share `[H, W]` in [0, 1] at every pixel of the picture."""


def draw_shares(picture: np.ndarray, people: Sequence[Person], opacity: float) -> np.ndarray:
    """uint8 `[H', W', 3]`: a picture uint8 `[H, W, 3]` with everybody's shares in colour, and a legend below it.

    The more a pixel looked at a person, the fuller the colour; it is full (`opacity`) where the shares of all who are
    shown add up to the most, and the legend says how much that is. As the colours come in, the picture's own fade to
    grey. The longer side gets 512 to 1536 pixels, without the legend.
    """
    scale = readable_scale(*picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    canvas = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    shares = [np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BILINEAR)) for _, _, share in people]
    most = max(float(np.sum(shares, axis=0).max()), np.finfo(np.float32).tiny)
    canvas = canvas + opacity * ((canvas @ np.array(LUMA, dtype=np.float32))[..., None] - canvas)
    covered = np.zeros_like(canvas)
    for (number, _, _), share in zip(people, shares):
        alpha = opacity * (share / most)[..., None]
        covered += alpha * (np.array(colour_of(number), dtype=np.float32) - canvas)
    drawn = Image.fromarray((canvas + covered).round().clip(0, 255).astype(np.uint8))
    return np.asarray(_with_legend(drawn, people))


def share_lines(people: Sequence[Person]) -> list[str]:
    """For example `1 Anna: 12 % on average, 43 % at most`."""
    return [
        f"{label_text(number, name)}: {100 * share.mean():.3g} % on average, {100 * share.max():.3g} % at most"
        for number, name, share in people
    ]


def _with_legend(picture: Image.Image, people: Sequence[Person]) -> Image.Image:
    lines = share_lines(people)
    height = max(LEAST_TEXT, round(LINE * max(picture.size)))
    box = height + height // 2
    font = fitting_font(lines, picture.width - box - height // 2, height)
    whole = Image.new("RGB", (picture.width, picture.height + box * len(lines)), GROUND)
    whole.paste(picture)
    pen = ImageDraw.Draw(whole)
    for row, ((number, _, _), line) in enumerate(zip(people, lines)):
        top = picture.height + row * box
        pen.rectangle((4, top + 4, box - 5, top + box - 5), fill=colour_of(number))
        pen.text((box, top + box / 2), line, fill=WRITING, font=font, anchor="lm")
    return whole
