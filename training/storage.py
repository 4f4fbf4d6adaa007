"""Files under one root, on the local disk or behind an fsspec URL, written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol
from uuid import uuid4

TEMPORARY = ".tmp-"


class Store(Protocol):
    """Paths are relative to the root and use forward slashes. Missing files raise ``FileNotFoundError``."""

    root: str

    def read(self, path: str) -> bytes: ...

    def read_range(self, path: str, offset: int, size: int) -> bytes: ...

    def write(self, path: str, data: bytes) -> None: ...

    def exists(self, path: str) -> bool: ...

    def remove(self, path: str) -> None: ...

    def sweep(self) -> int: ...

    def names(self, folder: str) -> list[str]: ...

    def open(self, path: str) -> BinaryIO: ...


def open_store(root: str | Path) -> Store:
    """A store for a folder or an fsspec URL (``s3://...``, ``memory://...``)."""
    text = str(root)
    if "://" not in text:
        return LocalStore(text)
    return LocalStore(text.removeprefix("file://")) if text.startswith("file://") else RemoteStore(text)


class LocalStore:
    """A folder. Keeps the last file that ``read_range`` used open, in this process only."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).expanduser())
        self._open: tuple[str, int, BinaryIO] | None = None

    def read(self, path: str) -> bytes:
        return self._at(path).read_bytes()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        # A forked loader process must not share the file position with its parent.
        if self._open is None or self._open[:2] != (path, os.getpid()):
            self._open = (path, os.getpid(), self._at(path).open("rb"))
        file = self._open[2]
        file.seek(offset)
        return file.read(size)

    def write(self, path: str, data: bytes) -> None:
        target = self._at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{uuid4().hex[:8]}-{target.name}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            raise _with_advice(error, target, len(data)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def exists(self, path: str) -> bool:
        return self._at(path).exists()

    def remove(self, path: str) -> None:
        self._at(path).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        return sorted(child.name for child in self._children(folder) if not child.name.startswith(TEMPORARY))

    def open(self, path: str) -> BinaryIO:
        return self._at(path).open("rb")

    def sweep(self) -> int:
        """Remove temporary files that a killed run left; returns how many."""
        left = list(Path(self.root).rglob(f"{TEMPORARY}*"))
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _at(self, path: str) -> Path:
        return Path(self.root) / PurePosixPath(path)

    def _children(self, folder: str) -> Iterator[Path]:
        place = self._at(folder)
        return place.iterdir() if place.is_dir() else iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_open": None}


class RemoteStore:
    """An fsspec file system. Object stores show an upload only when it is complete."""

    def __init__(self, root: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise ValueError(f"{root} is a URL, which needs fsspec: pip install fsspec") from error
        self.root = root.rstrip("/")
        try:
            self._files, self._base = url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot open {root}: {error}") from error

    def read(self, path: str) -> bytes:
        return self._files.cat_file(self._at(path))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        return self._files.cat_file(self._at(path), start=offset, end=offset + size)

    def write(self, path: str, data: bytes) -> None:
        self._files.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(self._at(path), data)

    def exists(self, path: str) -> bool:
        return self._files.exists(self._at(path))

    def remove(self, path: str) -> None:
        if self.exists(path):
            self._files.rm_file(self._at(path))

    def names(self, folder: str) -> list[str]:
        place = self._at(folder)
        if not self._files.isdir(place):
            return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in self._files.ls(place, detail=False))

    def open(self, path: str) -> BinaryIO:
        return self._files.open(self._at(path), "rb")

    def find(self, path: str = "") -> dict[str, dict[str, Any]]:
        """Everything below the root (or the one file ``path``) as {relative path: what the file system knows}."""
        if path:
            return {path: self._files.info(self._at(path))}
        found = self._files.find(self._base, detail=True)
        prefix = len(str(self._base).rstrip("/")) + 1
        return {str(name)[prefix:]: info for name, info in found.items()}

    def sweep(self) -> int:
        """Uploads leave nothing behind that could be seen."""
        return 0

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base


def _with_advice(error: OSError, target: Path, size: int) -> OSError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return OSError(error.errno, f"cannot write {target}: {error.strerror}")
    try:
        free = f"{shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free"
    except OSError:
        free = "unknown space free"
    return OSError(error.errno, f"the disk is full: could not write {size / 2**20:.1f} MiB to {target} ({free})")
