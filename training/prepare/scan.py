"""Stage ``scan``: open every file, check that it decodes, and take its size, sha256 and perceptual hash."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
from PIL import Image

from .decode import DropError, Picture, decode
from .reasons import alive, dropped
from .stage import Context, Stage, Tables
from .tables import DROP_FIELDS, Row

SCHEMA = pa.schema(
    [
        ("sha256", pa.string()),
        ("phash", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("frames", pa.int32()),
        *DROP_FIELDS,
    ]
)
HASH_SIDE = 16


def scan(context: Context, tables: Tables, shard: int) -> list[Row]:
    """One row per listed file; files that cannot be used get a reason."""
    return [_scan_file(context, row) if alive(row) else {} for row in tables["list"]]


def load(context: Context, listed: Row) -> tuple[bytes, Picture]:
    """Bytes and pixels of a listed file. Raises ``DropError``."""
    try:
        data = context.read_input(listed["root"], listed["image"])
    except OSError as error:
        raise DropError("unreadable", str(error.strerror or error)) from error
    if len(data) < listed["image"]["size"]:
        raise DropError("corrupt", f"{len(data)} bytes instead of {listed['image']['size']}")
    return data, decode(data, max_pixels=context.config.scan.max_pixels)


def load_again(context: Context, listed: Row, sha256: str) -> Picture:
    """Pixels of a file that was scanned before. Raises ``DropError`` when it is no longer the same file."""
    try:
        data, picture = load(context, listed)
    except DropError as error:
        raise DropError("changed", str(error)[:200]) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DropError("changed", "its bytes are not those that were scanned")
    return picture


def difference_hash(pixels: np.ndarray) -> bytes:
    """256 bits: is each cell of a 16 x 17 grey thumbnail brighter than its right neighbour (dHash)."""
    grey = Image.fromarray(pixels).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(grey).astype(np.int16)
    return np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes()


def _scan_file(context: Context, listed: Row) -> Row:
    try:
        data, picture = load(context, listed)
    except DropError as error:
        return dropped(error.reason, error.detail)
    height, width = picture.pixels.shape[:2]
    row: Row = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "phash": difference_hash(picture.pixels),
        "width": width,
        "height": height,
        "format": picture.format,
        "mode": picture.mode,
        "frames": picture.frames,
    }
    if picture.frames > 1 and context.config.scan.animated == "drop":
        row |= dropped("animated", f"{picture.frames} frames")
    return row


STAGE = Stage("scan", 1, ("list",), SCHEMA, lambda config: config.scan, each=scan)
