"""The list of all inputs in a fixed order: pictures in folders, members of tars, and what img2dataset failed to get."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import pyarrow as pa

from training.storage import Store, open_store

from .archives import failed_downloads, list_tar
from .keys import make_keys
from .reasons import dropped
from .tables import DROP_FIELDS, LOCATION, Row, to_table
from .walk import FoundFile, walk

logger = logging.getLogger("fusedid")

_RASTER = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_RARE = (".avif", ".heic", ".jp2", ".ppm")
IMAGE_SUFFIXES = frozenset(_RASTER + _RARE)
SIDECAR_SUFFIXES = (".txt", ".json")
IGNORED_NAMES = frozenset(("thumbs.db", "desktop.ini", ".ds_store"))
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("root", pa.int32()),
        ("image", LOCATION),
        ("txt", LOCATION),
        ("json", LOCATION),
        ("stamp", pa.string()),
        *DROP_FIELDS,
    ]
)


def split_root(path: str) -> tuple[str, str]:
    """An input as (folder, name in it): a tar given by its path is listed as the only file of its folder."""
    if PurePosixPath(path).suffix.lower() == ".tar":
        folder, _, name = path.rpartition("/")
        return folder or ("/" if path.startswith("/") else "."), name
    return path, ""


def open_input(path: str) -> Store:
    """The store that an input's locations are relative to."""
    return open_store(split_root(path if "://" in path else str(Path(path).expanduser()).replace("\\", "/"))[0])


def list_inputs(inputs: tuple[str, ...]) -> pa.Table:
    """One row per input file, archive member and failed download, with unique keys. ``ValueError`` for a bad folder."""
    rows: list[Row] = []
    for root, path in enumerate(inputs):
        before = len(rows)
        rows += [{**row, "root": root} for row in _list_root(path)]
        logger.info("%s: %d files", path, len(rows) - before)
    if not any(row.get("reason") is None for row in rows):
        places = ", ".join(inputs)
        raise ValueError(f"found no pictures in {places}; accepted are {' '.join(sorted(IMAGE_SUFFIXES))} and .tar")
    # Two folders may hold files of the same name, and one folder may be given twice.
    prefixes = ["" if len(inputs) == 1 else f"{row['root']}/" for row in rows]
    keys = make_keys([prefix + row["source"] for prefix, row in zip(prefixes, rows, strict=True)])
    return to_table([{**row, "key": key} for key, row in zip(keys, rows, strict=True)], SCHEMA)


def _list_root(path: str) -> Iterator[Row]:
    store = open_input(path)
    only = split_root(path)[1]
    found = {file.path: file for file in walk(store, only)}
    for name in sorted(found):
        file = found[name]
        if file.error is not None:
            yield {"source": name, "stamp": "", **dropped("unreadable", file.error)}
        elif name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
            raise ValueError(f"{name} is a compressed tar, which has no random access; unpack it to a plain .tar first")
        elif name.lower().endswith(".tar"):
            yield from list_tar(store, file, IMAGE_SUFFIXES)
        elif _is_download_log(name, found):
            yield from failed_downloads(store, name)
        elif PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            yield _picture_row(file, found)
        elif not _is_companion(name, found):
            yield {"source": name, "stamp": file.stamp, **dropped("not_an_image", PurePosixPath(name).suffix)}


def _picture_row(file: FoundFile, found: Mapping[str, FoundFile]) -> Row:
    row: Row = {"source": file.path, "image": _whole(file), "stamp": file.stamp}
    for suffix in SIDECAR_SUFFIXES:
        beside = found.get(str(PurePosixPath(file.path).with_suffix(suffix)))
        if beside is not None:
            row[suffix[1:]] = _whole(beside)
            row["stamp"] += f"+{beside.stamp}"
    return row


def _whole(file: FoundFile) -> Row:
    return {"path": file.path, "offset": -1, "size": file.size}


def _is_companion(name: str, found: Mapping[str, FoundFile]) -> bool:
    path = PurePosixPath(name)
    if path.name.lower() in IGNORED_NAMES or path.name.startswith("._") or name.endswith("_stats.json"):
        return True
    if path.suffix.lower() not in SIDECAR_SUFFIXES:
        return False
    return any(str(path.with_suffix(suffix)) in found for kind in IMAGE_SUFFIXES for suffix in (kind, kind.upper()))


def _is_download_log(name: str, found: Mapping[str, FoundFile]) -> bool:
    path = PurePosixPath(name)
    if path.suffix != ".parquet":
        return False
    folder = f"{path.with_suffix('')}/"
    return str(path.with_suffix(".tar")) in found or any(other.startswith(folder) for other in found)
