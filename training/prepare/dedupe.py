"""Stage ``dedupe``: of equal or nearly equal pictures one is kept, the one with the most pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from .reasons import dropped
from .stage import Context, Stage
from .tables import DROP_FIELDS, Row, to_table

SCHEMA = pa.schema([("duplicate_of", pa.string()), *DROP_FIELDS])
HASH_BITS = 256


def dedupe(context: Context, tables: Mapping[str, pa.Table]) -> pa.Table:
    """One row per listed file; copies name the picture that stays."""
    config = context.config.dedupe
    keys = tables["list"]["key"].to_pylist()
    scanned = tables["scan"]
    usable = [
        place
        for place, (listed, seen) in enumerate(
            zip(tables["list"]["reason"].to_pylist(), scanned["reason"].to_pylist(), strict=True)
        )
        if listed is None and seen is None
    ]
    rows: list[Row] = [{} for _ in keys]
    if config.exact:
        hashes = scanned["sha256"].to_pylist()
        for copy, original in equal_copies(usable, hashes):
            rows[copy] = {"duplicate_of": keys[original], **dropped("duplicate", f"same bytes as {keys[original]}")}
    if config.max_distance is not None:
        left = [place for place in usable if not rows[place]]
        pixels = np.asarray(scanned["width"].fill_null(0)).astype(np.int64) * np.asarray(scanned["height"].fill_null(0))
        order = sorted(left, key=lambda place: (-pixels[place], place))
        hashes = scanned["phash"].to_pylist()
        for copy, original, distance in near_copies(order, hashes, config.max_distance):
            detail = f"{distance} of {HASH_BITS} bits differ from {keys[original]}"
            rows[copy] = {"duplicate_of": keys[original], **dropped("near_duplicate", detail)}
    return to_table(rows, SCHEMA)


def equal_copies(places: Sequence[int], hashes: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(copy, original) for every place whose hash came up before."""
    first: dict[str, int] = {}
    for place in places:
        original = first.setdefault(hashes[place], place)
        if original != place:
            yield place, original


def near_copies(order: Sequence[int], hashes: Sequence[bytes], distance: int) -> Iterator[tuple[int, int, int]]:
    """(copy, kept picture, differing bits) for every place that is within ``distance`` bits of an earlier kept one.

    ``order`` decides who is kept. Two hashes that differ in at most d bits agree in at least one of d + 1 bands of
    bits, so only pictures that share a band are compared.
    """
    buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(distance + 1)]
    for place in order:
        bits = np.unpackbits(np.frombuffer(hashes[place], dtype=np.uint8))
        bands = [band.tobytes() for band in np.array_split(bits, distance + 1)]
        candidates = sorted({other for bucket, band in zip(buckets, bands) for other in bucket.get(band, ())})
        near = _nearest(hashes[place], candidates, hashes, distance)
        if near is not None:
            yield place, *near
            continue
        for bucket, band in zip(buckets, bands):
            bucket[band].append(place)


def _nearest(mine: bytes, candidates: Sequence[int], hashes: Sequence[bytes], limit: int) -> tuple[int, int] | None:
    number = int.from_bytes(mine, "big")
    distances = [((number ^ int.from_bytes(hashes[other], "big")).bit_count(), other) for other in candidates]
    best = min(distances, default=None)
    return (best[1], best[0]) if best is not None and best[0] <= limit else None


STAGE = Stage(
    "dedupe",
    1,
    ("list", "scan"),
    SCHEMA,
    lambda config: config.dedupe,
    whole=dedupe,
    columns={"list": ("key", "reason"), "scan": ("reason", "sha256", "phash", "width", "height")},
)
