"""Sample keys: short, unique, the same on every run, and safe inside a webdataset tar."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_UNSAFE = re.compile(r"[^\w/-]+")


def make_keys(sources: Sequence[str]) -> list[str]:
    """One key per source path, in order.

    The path without its suffix; dots become underscores because webdataset ends a key at the first dot. Names that
    would collide get their suffix, and then a hash of the full source, appended.
    """
    taken: set[str] = set()
    return [_claim(source, taken) for source in sources]


def _claim(source: str, taken: set[str]) -> str:
    # An archive's members live in a folder of its name.
    path = PurePosixPath(source.replace("::", "/"))
    plain = _safe(str(path.with_suffix("")) if path.name else source)
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()
    for key in (plain, f"{plain}_{path.suffix.lstrip('.').lower()}", f"{plain}_{digest[:12]}", digest):
        # A case-insensitive disk would unpack two such members onto each other.
        if key.lower() not in taken:
            taken.add(key.lower())
            return key
    raise AssertionError(f"the source {source} was listed twice")


def _safe(text: str) -> str:
    return _UNSAFE.sub("_", text).strip("/") or "_"
