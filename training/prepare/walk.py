"""All files below a folder or URL, in a fixed order; an unreadable sub-folder is reported, not skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.storage import LocalStore, RemoteStore, Store


@dataclass(frozen=True)
class FoundFile:
    """A file, by its path relative to the root, with forward slashes."""

    path: str
    size: int
    stamp: str
    """Changes when the file does: size and modification time, or what the remote side offers."""
    error: str | None = None
    """Set when this is a folder or link that could not be read."""


def walk(store: Store, only: str = "") -> Iterator[FoundFile]:
    """Every file below the store's root, or just the one named. ``ValueError`` when the root itself cannot be read."""
    if isinstance(store, LocalStore):
        yield from _walk_local(Path(store.root), only)
    elif isinstance(store, RemoteStore):
        yield from _walk_remote(store, only)


def _walk_local(root: Path, only: str) -> Iterator[FoundFile]:
    problem = _root_problem(root, only)
    if problem:
        raise ValueError(f"the input {root / only} {problem}; give a readable folder of pictures or a .tar file")
    if only:
        yield _local_file(root / only, only)
        return
    failures: list[OSError] = []
    # A link to a folder is followed by nobody who wants to avoid endless loops.
    for folder, folders, names in os.walk(root, onerror=failures.append):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            yield _local_file(path, path.relative_to(root).as_posix())
    for failure in failures:
        name = Path(failure.filename or root).relative_to(root).as_posix()
        yield FoundFile(name, 0, "", f"cannot list the folder: {failure.strerror}")


def _root_problem(root: Path, only: str) -> str | None:
    place = root / only
    if not place.exists():
        return "does not exist"
    if bool(only) == place.is_dir():
        return "is a folder, not a tar" if only else "is a file, not a folder"
    try:
        if not only:
            os.scandir(root).close()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _local_file(path: Path, name: str) -> FoundFile:
    try:
        stat = path.stat()
    except OSError as error:
        return FoundFile(name, 0, "", f"{error.strerror}")
    return FoundFile(name, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")


def _walk_remote(store: RemoteStore, only: str) -> Iterator[FoundFile]:
    try:
        found = store.find(only)
    except OSError as error:
        raise ValueError(
            f"the input {store.root}/{only} cannot be listed ({error}); check the URL and the access"
        ) from error
    if not found:
        raise ValueError(f"the input {store.root}/{only} is empty or does not exist; check the URL")
    for name in sorted(found):
        info = found[name]
        size = int(info.get("size") or 0)
        mark = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
        yield FoundFile(name, size, f"{size}-{mark}")
