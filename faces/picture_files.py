"""Decoded picture files to upright 8-bit sRGB, whatever their mode, depth or colour profile."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
LARGEST_16, LARGEST_32 = 65535, 2**31 - 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as Pillow opened it, in mode RGB: turned as its camera noted, in sRGB, transparent parts white.

    Raises what Pillow raises for damaged files.
    """
    turned = ImageOps.exif_transpose(image)
    if turned.mode in SIXTEEN_BIT:
        return _from_integers(turned)
    if turned.mode == "F":
        return _from_floats(turned)
    if turned.has_transparency_data:
        layers = turned.convert("RGBA")
        colours = _in_srgb(layers.convert("RGB"), turned.info.get("icc_profile"))
        colours.putalpha(layers.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), colours).convert("RGB")
    flat = turned.convert("RGB") if turned.mode == "P" else turned
    return _in_srgb(flat, turned.info.get("icc_profile"))


def _from_integers(image: Image.Image) -> Image.Image:
    """16 bits per pixel, however dark; mode I may also hold 32."""
    values = np.asarray(image).astype(np.int64)
    top = LARGEST_32 if values.max(initial=0) > LARGEST_16 else LARGEST_16
    return _grey(np.clip(values, 0, top) / top)


def _from_floats(image: Image.Image) -> Image.Image:
    """Values up to 1 are shares of white; larger ones are 8- or 16-bit numbers kept as floats."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = values.max(initial=0.0)
    return _grey(values / next((top for top in (1.0, 255.0) if largest <= top), float(LARGEST_16)))


def _grey(shares_HW: Any) -> Image.Image:
    levels = np.rint(np.clip(shares_HW, 0.0, 1.0) * 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """By the file's profile; pictures without one, or with one that does not fit them, are taken as sRGB."""
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")
    return image.convert("RGB") if converted is None else converted
