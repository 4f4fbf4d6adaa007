"""Picture files of every mode and depth to the same 8-bit sRGB; colours are computed by hand or by littleCMS itself."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from faces.picture_files import upright_rgb

RGB = (200, 40, 90)


def reopened(image: Image.Image, kind: str = "PNG", **options: Any) -> np.ndarray:
    """A picture through a file of a kind, decoded."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    with Image.open(io.BytesIO(data.getvalue())) as opened:
        return np.asarray(upright_rgb(opened)).astype(int)


def exchanged_profile() -> bytes:
    """sRGB's profile with red and green exchanged: each colour is another, and which is known."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12], profile[red + 4 : red + 12],
    )  # fmt: skip
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_the_colour_profile_counts_in_every_mode(mode):
    flat = Image.fromarray(np.full((8, 8, 3), RGB, np.uint8))
    image = flat.quantize(8) if mode == "P" else flat.convert(mode)
    pixels = reopened(image, icc_profile=exchanged_profile())
    assert np.abs(pixels - (RGB[1], RGB[0], RGB[2])).max() <= 1
    assert np.abs(reopened(image) - RGB).max() <= 1, "without one it is sRGB"


def test_transparent_parts_are_white_and_half_transparent_ones_half_of_it():
    layers = np.full((4, 4, 4), (*RGB, 255), np.uint8)
    layers[0, :, 3], layers[1, :, 3] = 0, 128
    pixels = reopened(Image.fromarray(layers, "RGBA"), icc_profile=exchanged_profile())
    there = np.array((RGB[1], RGB[0], RGB[2]))
    assert (pixels[0] == 255).all()
    assert np.abs(pixels[1] - (255 + (there - 255) * 128 / 255)).max() <= 1
    assert np.abs(pixels[2] - there).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("value", [0, 200, 255, 256, 5000, 65535])
def test_16_bits_are_16_bits_however_dark(kind, value):
    pixels = reopened(Image.fromarray(np.full((8, 8), value, np.uint16)), kind)
    assert np.abs(pixels - value / 257).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("value", "wanted"), [(0.0, 0), (0.5, 127.5), (1.0, 255)])
def test_floats_are_shares_of_white(value, wanted):
    assert np.abs(reopened(Image.fromarray(np.full((8, 8), value, np.float32)), "TIFF") - wanted).max() <= 0.5


def test_floats_may_hold_bytes_and_no_number_is_black():
    deep = np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8)
    assert np.abs(reopened(Image.fromarray(deep), "TIFF")[..., 0] - deep).max() <= 0.5
    deep[0, 0] = np.nan
    assert reopened(Image.fromarray(deep), "TIFF")[0, 0].max() == 0


def test_a_damaged_profile_is_as_none():
    image = Image.fromarray(np.full((8, 8, 3), RGB, np.uint8))
    assert np.abs(reopened(image, icc_profile=b"no profile at all" * 20) - RGB).max() == 0


def test_a_camera_held_upright_gives_an_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = reopened(Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None], 30, 0)), exif=exif)
    assert pixels.shape == (40, 30, 3) and pixels[0].max() == 0 and pixels[-1].min() == 39
