"""Picture files to upright 8-bit RGB arrays, or the reason why not."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from faces.picture_files import upright_rgb

from .reasons import ADVICE

_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
"""Pillow names the object it read from, which would make the result differ between runs."""


class DropError(Exception):
    """A picture that cannot be used: ``reason`` is one of ``reasons.ADVICE``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail} ({ADVICE[reason]})")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[DropError], tuple[str, str]]:
        return DropError, (self.reason, self.detail)


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture."""

    pixels: np.ndarray
    """uint8 ``[H, W, 3]`` sRGB, turned upright."""
    format: str
    mode: str
    """Pillow's mode of the file, e.g. ``CMYK``."""
    frames: int


def decode(data: bytes, *, max_pixels: int) -> Picture:
    """Decode the first frame; transparent parts become white. Raises ``DropError`` when that is impossible."""
    try:
        with _own_limit(), Image.open(io.BytesIO(data)) as image:
            _check_pixels(image.size, max_pixels)
            image.load()
            pixels = np.asarray(upright_rgb(image))
            return Picture(pixels, image.format or "?", image.mode, getattr(image, "n_frames", 1))
    except DropError:
        raise
    # Damaged files make Pillow's many decoders raise nearly every built-in exception.
    except Exception as error:
        raise DropError("corrupt", f"{type(error).__name__}: {_ADDRESS.sub('', str(error)).strip()}"[:200]) from error


@contextmanager
def _own_limit() -> Iterator[None]:
    """Switch Pillow's fixed limit off while ours, checked before any pixel is decoded, is in force."""
    theirs = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = theirs


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise DropError("too_many_pixels", f"{size[0]}x{size[1]} is more than {max_pixels} pixels")
