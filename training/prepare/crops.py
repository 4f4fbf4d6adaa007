"""Stage ``crops``: where the packed target is cut out. Geometry only; pixels move in ``pack``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import pyarrow as pa

from .config import CropsConfig
from .reasons import alive
from .stage import Context, Stage, Tables
from .tables import DROP_FIELDS, Row

SCHEMA = pa.schema(
    [
        ("target_box", pa.list_(pa.int32())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        *DROP_FIELDS,
    ]
)


def crops(context: Context, tables: Tables, shard: int) -> list[Row]:
    """One row per listed file: the target's box in source pixels and its packed size."""
    return [
        _crop(context.config.crops, scanned, selected) if alive(listed, scanned, unique, selected) else {}
        for listed, scanned, unique, selected in zip(*(tables[name] for name in STAGE.needs), strict=True)
    ]


@lru_cache(maxsize=8)
def buckets(resolution: int, step: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """(width, height) of all buckets: multiples of ``step``, at most ``resolution``² pixels, as large as they fit."""
    area = resolution * resolution
    found = set()
    for width in range(step, int(resolution * math.sqrt(max_aspect)) + step, step):
        height = area // width // step * step
        if height and max(width / height, height / width) <= max_aspect:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found)) or ((resolution, resolution),)


def nearest_bucket(width: int, height: int, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket whose shape is most like the picture's; of two equally good ones the larger."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 6), -size[0] * size[1], size))


def largest_box(width: int, height: int, aspect: float, center: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest box of shape ``aspect`` (width / height) inside the picture, as near to ``center`` as possible."""
    box_width = min(width, max(1, round(height * aspect)))
    box_height = min(height, max(1, round(width / aspect)))
    left = min(max(0, round(center[0] - box_width / 2)), width - box_width)
    top = min(max(0, round(center[1] - box_height / 2)), height - box_height)
    return left, top, left + box_width, top + box_height


def square_around(box: Sequence[float], width: int, height: int, margin: float) -> tuple[int, int, int, int]:
    """A square around a face, ``margin`` of its longer side wider on each side, moved and shrunk to fit the picture."""
    x0, y0, x1, y1 = box
    side = min(width, height, max(1, round(max(x1 - x0, y1 - y0) * (1 + 2 * margin))))
    left = min(max(0, round((x0 + x1 - side) / 2)), width - side)
    top = min(max(0, round((y0 + y1 - side) / 2)), height - side)
    return left, top, left + side, top + side


def _crop(config: CropsConfig, scanned: Row, selected: Row) -> Row:
    width, height = scanned["width"], scanned["height"]
    if config.mode == "square":
        size = (config.resolution, config.resolution)
    else:
        size = nearest_bucket(width, height, buckets(config.resolution, config.bucket_step, config.max_aspect))
    center = (width / 2, height / 2)
    if selected["box"]:
        x0, y0, x1, y1 = selected["box"]
        center = ((x0 + x1) / 2, (y0 + y1) / 2)
    box = largest_box(width, height, size[0] / size[1], center)
    if config.around == "face" and selected["box"]:
        box = square_around(selected["box"], width, height, config.face_margin)
    return {"target_box": list(box), "width": size[0], "height": size[1]}


STAGE = Stage(
    "crops",
    1,
    ("list", "scan", "dedupe", "select"),
    SCHEMA,
    lambda config: config.crops.model_dump(exclude={"reference_size", "reference_margin"}),
    each=crops,
)
