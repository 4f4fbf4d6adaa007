"""Members of webdataset and img2dataset tars by offset, and img2dataset's log of what it could not download."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from training.storage import Store

from .reasons import dropped
from .tables import Row
from .walk import FoundFile


def list_tar(store: Store, file: FoundFile, image_suffixes: frozenset[str]) -> Iterator[Row]:
    """One row per picture in a tar, with its ``.txt`` and ``.json`` of the same webdataset key.

    A tar that ends early gives the rows before the damage and one row that says so.
    """
    members: dict[str, dict[str, Row]] = {}
    broken: str | None = None
    try:
        with store.open(file.path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    _add(members, member, file.path)
            # tarfile takes a missing end for the end.
            if _ends_early(members, file.size):
                broken = "the last member is cut off"
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        broken = f"{type(error).__name__}: {error}"
    for stem, parts in members.items():
        yield from _rows(stem, parts, file, image_suffixes)
    if broken is not None:
        detail = f"the archive is damaged after {len(members)} samples: {broken}"
        yield {"source": file.path, "stamp": file.stamp, **dropped("corrupt", detail[:200])}


def failed_downloads(store: Store, path: str) -> Iterator[Row]:
    """Rows for what img2dataset's Parquet log calls anything but a success. Other Parquet files give one row."""
    try:
        table = pq.read_table(io.BytesIO(store.read(path)))
        names = [name for name in ("key", "url", "status", "error_message") if name in table.column_names]
        rows = table.select(names).to_pylist()
    except (pa.ArrowException, OSError) as error:
        yield {"source": path, "stamp": "", **dropped("corrupt", f"not a Parquet file: {error}"[:200])}
        return
    if "status" not in table.column_names:
        yield {"source": path, "stamp": "", **dropped("not_an_image", ".parquet")}
        return
    for number, row in enumerate(rows):
        if row["status"] != "success":
            source = f"{path}::{row.get('key') or number}"
            detail = f"{row['status']}: {row.get('error_message') or ''} {row.get('url') or ''}".strip()
            yield {"source": source, "stamp": "", **dropped("download_failed", detail[:300])}


def _add(members: dict[str, dict[str, Row]], member: tarfile.TarInfo, path: str) -> None:
    folder, slash, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    location: Row = {"path": path, "offset": member.offset_data, "size": member.size}
    members.setdefault(f"{folder}{slash}{stem}", {})[f".{suffix.lower()}"] = location


def _ends_early(members: dict[str, dict[str, Row]], size: int) -> bool:
    return any(part["offset"] + part["size"] > size for parts in members.values() for part in parts.values())


def _rows(stem: str, parts: dict[str, Row], file: FoundFile, image_suffixes: frozenset[str]) -> Iterator[Row]:
    pictures = [suffix for suffix in parts if suffix in image_suffixes]
    for suffix in pictures:
        row: Row = {"source": f"{file.path}::{stem}{suffix}", "image": parts[suffix]}
        row |= {name: parts[f".{name}"] for name in ("txt", "json") if f".{name}" in parts}
        yield {**row, "stamp": file.stamp}
    for suffix in parts:
        if not pictures or suffix not in (*pictures, ".txt", ".json"):
            source = f"{file.path}::{stem}{suffix}"
            yield {"source": source, "stamp": file.stamp, **dropped("not_an_image", suffix)}
