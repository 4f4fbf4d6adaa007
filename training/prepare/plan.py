"""Stage ``plan``: the kept pictures in shards of equal size, with all that packing needs to know about each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from .stage import Context, Stage
from .tables import FLOATS, LOCATION

COLUMNS: dict[str, tuple[str, ...]] = {
    "list": ("key", "source", "root", "image", "reason"),
    "scan": ("sha256", "width", "height", "reason"),
    "dedupe": ("reason",),
    "faces": ("reason",),
    "select": ("human", "n_faces", "box", "keypoints", "score", "yaw", "sharpness", "embedding", "reason"),
    "crops": ("target_box", "width", "height", "reason"),
    "mask": ("outline", "reason"),
    "captions": ("caption", "caption_from", "reason"),
    "identity": ("reason",),
}
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("root", pa.int32()),
        ("image", LOCATION),
        ("sha256", pa.string()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("human", pa.bool_()),
        ("n_faces", pa.int32()),
        ("box", FLOATS),
        ("keypoints", FLOATS),
        ("score", pa.float32()),
        ("yaw", pa.float32()),
        ("sharpness", pa.float32()),
        ("embedding", FLOATS),
        ("target_box", pa.list_(pa.int32())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("outline", FLOATS),
        ("caption", pa.string()),
        ("caption_from", pa.string()),
    ]
)


def kept(tables: Mapping[str, pa.Table]) -> np.ndarray:
    """bool ``[N]``: no stage dropped the picture."""
    alive = np.ones(tables["list"].num_rows, dtype=bool)
    for table in tables.values():
        alive &= np.asarray(table["reason"].is_null())
    return alive


def plan(context: Context, tables: Mapping[str, pa.Table]) -> pa.Table:
    """The kept pictures in listing order. Stays in Arrow: millions of rows would not fit as Python objects."""
    alive = pa.array(kept(tables))
    columns = {}
    for stage, names in COLUMNS.items():
        for name in names:
            target = f"source_{name}" if stage == "scan" and name != "sha256" else name
            if name != "reason":
                columns[target] = tables[stage][name].filter(alive)
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


STAGE = Stage(
    "plan",
    1,
    tuple(COLUMNS),
    SCHEMA,
    lambda config: config.pack.samples_per_shard,
    whole=plan,
    columns=COLUMNS,
    rows_per_shard=lambda config: config.pack.samples_per_shard,
)
