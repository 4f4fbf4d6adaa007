"""The result: ``index.parquet`` (every kept sample), ``dropped.parquet`` (every other input), ``pairs.parquet``."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .find_faces import encoder_identity
from .pack import MEMBERS
from .plan import COLUMNS, kept
from .stage import Context
from .stages import LISTED
from .tables import content_digest, read_all, to_parquet

INDEX, DROPPED, PAIRS, MANIFEST = "index.parquet", "dropped.parquet", "pairs.parquet", "manifest.json"
SCHEMA_VERSION = 1
FROM_PLAN = (
    "key",
    "source",
    "sha256",
    "source_width",
    "source_height",
    "width",
    "height",
    "human",
    "n_faces",
    "score",
    "yaw",
    "sharpness",
    "caption",
    "caption_from",
)
FROM_SELECT = ("face_side", "face_area", "norm")
FROM_PACK = ("shard", "face_box", "keypoints", *(f"{m}_{what}" for m in MEMBERS for what in ("offset", "size")))
FROM_PEOPLE = ("person", "photos", "split")
DROPPED_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Result:
    """What the run has made, as tables."""

    index: pa.Table
    dropped: pa.Table
    pairs: pa.Table


def build_result(context: Context, rows: dict[str, list[int]]) -> Result:
    """Join the stages' results into the three tables. ``rows`` are the rows of each shard, by stage."""
    listed = {stage: read_all(context.output, stage, len(rows[stage]), _columns(stage)) for stage in LISTED}
    alive = kept(listed)
    if not alive.any():
        empty = pa.table({"key": pa.array([], pa.string())})
        return Result(empty, _dropped(listed, None), _pairs(listed, alive))
    planned = read_all(context.output, "plan", len(rows["plan"]))
    packed = read_all(context.output, "pack", len(rows["pack"]))
    columns = {name: planned[name] for name in FROM_PLAN}
    columns |= {name: packed[name] for name in FROM_PACK}
    mask = pa.array(alive)
    columns |= {name: listed["select"][name].filter(mask) for name in FROM_SELECT}
    columns |= {name: listed["identity"][name].filter(mask) for name in FROM_PEOPLE}
    written = np.asarray(packed["reason"].is_null())
    index = pa.table(columns).filter(pa.array(written)).combine_chunks()
    pairs = _pairs(listed, alive)
    if not written.all():
        stays = pc.is_in(pairs["key"], index["key"])
        pairs = pairs.filter(pc.and_(stays, pc.is_in(pairs["other"], index["key"])))
    return Result(index, _dropped(listed, pa.table({"key": planned["key"], **_reason(packed)})), pairs)


def write_result_files(context: Context, result: Result) -> None:
    """Write the tables and the manifest; the manifest comes last, so a folder with one is complete."""
    for name, table in ((INDEX, result.index), (DROPPED, result.dropped), (PAIRS, result.pairs)):
        context.output.write(name, to_parquet(table))
    manifest = {
        "fusedid.prepare": SCHEMA_VERSION,
        "samples": result.index.num_rows,
        "dropped": result.dropped.num_rows,
        "index_sha256": content_digest(result.index),
        "face_encoder": encoder_identity(context.config.faces),
        "config": context.config.model_dump(mode="json", exclude={"run", "output"}),
    }
    context.output.write(MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())


def _columns(stage: str) -> list[str]:
    extra = {
        "list": ("key", "source"),
        "scan": ("sha256", "width", "height"),
        "select": FROM_SELECT,
        "identity": (*FROM_PEOPLE, "pairs", "cosines"),
    }
    return [*extra.get(stage, ()), *(["reason", "detail"] if stage in COLUMNS else [])]


def _reason(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {"reason": table["reason"], "detail": table["detail"]}


def _dropped(listed: dict[str, pa.Table], packed: pa.Table | None) -> pa.Table:
    """Every input that is not in the index, with the first stage that dropped it."""
    parts = []
    before = np.ones(listed["list"].num_rows, dtype=bool)
    for stage in LISTED:
        here = ~np.asarray(listed[stage]["reason"].is_null()) & before
        before &= ~here
        parts.append((np.flatnonzero(here), stage, listed[stage]))
    if packed is not None:
        failed = ~np.asarray(packed["reason"].is_null())
        parts.append((np.flatnonzero(before)[failed], "pack", None))
    tables = []
    for places, stage, table in parts:
        take = pa.array(places)
        columns = {name: listed["list"][name].take(take) for name in ("key", "source")}
        columns |= {name: listed["scan"][name].take(take) for name in ("sha256", "width", "height")}
        columns["stage"] = pa.array([stage] * len(places), pa.string())
        reasons = packed.filter(pc.is_valid(packed["reason"])) if table is None and packed is not None else None
        columns |= _reason(reasons) if reasons is not None else {n: c.take(take) for n, c in _reason(table).items()}
        tables.append(pa.table([columns[name] for name in DROPPED_SCHEMA.names], schema=DROPPED_SCHEMA))
    return pa.concat_tables(tables).sort_by("key").combine_chunks()


def _pairs(listed: dict[str, pa.Table], alive: np.ndarray) -> pa.Table:
    """(key, other, cosine): same-person pairs, as the ``identity`` stage drew them."""
    mask = pa.array(alive)
    others = listed["identity"]["pairs"].filter(mask).combine_chunks()
    cosines = listed["identity"]["cosines"].filter(mask).combine_chunks()
    keys = listed["list"]["key"].filter(mask).combine_chunks()
    if not len(others):
        return pa.table({"key": keys, "other": pa.array([], pa.string()), "cosine": pa.array([], pa.float32())})
    owner = keys.take(pc.list_parent_indices(others))
    return pa.table({"key": owner, "other": pc.list_flatten(others), "cosine": pc.list_flatten(cosines)})
