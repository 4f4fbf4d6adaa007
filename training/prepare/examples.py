"""Example pictures for the report: kept samples, people with several photos, and what each filter took away."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from .decode import DropError
from .index import Result
from .pack import shard_path
from .pictures import contact_sheet, encoded, histogram, outlined, tiled
from .scan import load
from .stage import Context
from .tables import Row, read_all

COLUMNS, KEPT_ROWS, PEOPLE_ROWS = 8, 3, 6
HISTOGRAMS = {
    "short side of the source, px": "short_side",
    "short side of the face, px": "face_side",
    "face's share of the picture": "face_area",
    "detection score": "score",
    "yaw, degrees": "yaw",
    "sharpness of the aligned face": "sharpness",
    "length of the embedding": "norm",
    "photos per person": "photos",
    "cosine of same-person pairs": "cosine",
}


def write_examples(context: Context, result: Result, list_shards: int) -> list[str]:
    """Write the report's pictures; returns their names."""
    sheets = {
        "kept": _kept_rows(context, result.index),
        "people": _people_rows(context, result.index),
        "dropped": _dropped_rows(context, result.dropped, list_shards),
    }
    names = []
    for name, rows in sheets.items():
        if rows:
            names.append(f"report/{name}.jpg")
            context.output.write(names[-1], encoded(contact_sheet(rows), "JPEG"))
    if result.index.num_rows:
        charts = [histogram(title, column_values(result, column)) for title, column in HISTOGRAMS.items()]
        names.append("report/histograms.png")
        context.output.write(names[-1], encoded(tiled(charts), "PNG"))
    return names


def read_member(context: Context, row: Row, member: str) -> Image.Image | None:
    """A packed picture of an index row; None when the sample has no such member."""
    if not row[f"{member}_size"]:
        return None
    data = context.output.read_range(shard_path(row["shard"]), row[f"{member}_offset"], row[f"{member}_size"])
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _kept_rows(context: Context, index: pa.Table) -> list[tuple[str, list[Image.Image]]]:
    places = _spread(index.num_rows, COLUMNS * KEPT_ROWS)
    pictures = []
    for row in index.take(pa.array(places)).to_pylist() if places else []:
        target = read_member(context, row, "target")
        assert target is not None, "every sample has a target"
        pictures.append(outlined(target, row["face_box"], read_member(context, row, "mask")))
    labels = ["packed targets: face box green, mask red"] + [""] * KEPT_ROWS
    return [(labels[at // COLUMNS], pictures[at : at + COLUMNS]) for at in range(0, len(pictures), COLUMNS)]


def _people_rows(context: Context, index: pa.Table) -> list[tuple[str, list[Image.Image]]]:
    if not index.num_rows:
        return []
    several = index.filter(pc.greater(index["photos"].fill_null(0), 1))
    people = sorted(set(several["person"].to_pylist()))
    rows = []
    for person in [people[place] for place in _spread(len(people), PEOPLE_ROWS)]:
        photos = several.filter(pc.equal(several["person"], person))
        faces = [read_member(context, row, "reference") for row in photos.slice(0, COLUMNS).to_pylist()]
        rows.append((f"{person}: {photos.num_rows} photos", [face for face in faces if face is not None]))
    return rows


def _dropped_rows(context: Context, dropped: pa.Table, list_shards: int) -> list[tuple[str, list[Image.Image]]]:
    shown = dropped.filter(pc.is_valid(dropped["width"]))
    places: dict[str, Row] = {}
    wanted = {
        reason: shown.filter(pc.equal(shown["reason"], reason)).slice(0, COLUMNS)
        for reason in sorted(set(shown["reason"].to_pylist()))
    }
    if wanted:
        listed = read_all(context.output, "list", list_shards, ["key", "root", "image"])
        keys = pa.concat_tables(wanted.values())["key"]
        found = listed.filter(pc.is_in(listed["key"], keys.combine_chunks())).to_pylist()
        places = {row["key"]: row for row in found}
    rows = []
    for reason, table in wanted.items():
        pictures = list(_sources(context, [places[key] for key in table["key"].to_pylist()]))
        details = ", ".join(table["detail"].slice(0, 3).to_pylist())
        rows.append((f"{reason}: {details}"[:150], pictures))
    return rows


def _sources(context: Context, listed: list[Row]) -> Iterator[Image.Image]:
    for row in listed:
        try:
            yield Image.fromarray(load(context, row)[1].pixels)
        except DropError:
            continue


def column_values(result: Result, column: str) -> np.ndarray:
    """The numbers behind one histogram, float64, NaN where a picture has none."""
    index = result.index
    if column == "cosine":
        return np.asarray(result.pairs["cosine"], dtype=np.float64)
    if column == "short_side":
        return np.minimum(np.asarray(index["source_width"]), np.asarray(index["source_height"])).astype(np.float64)
    values = np.asarray(index[column].cast(pa.float64()).fill_null(np.nan))
    if column != "photos":
        return values
    # One entry per person, not per photo.
    _, first = np.unique(index["person"].fill_null("").to_pylist(), return_index=True)
    return values[first]


def _spread(count: int, most: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))}) if count else []
