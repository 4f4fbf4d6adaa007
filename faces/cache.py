"""Detections and embeddings remembered by content for the life of the process, in a bounded number of entries."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np

from .detect import Detections, find_faces
from .encoder import FaceEncoder

T = TypeVar("T")
MAX_ENTRIES = 4096
"""An entry is a few boxes or one embedding, at most a few KiB: 4096 of them stay below 20 MiB."""

_entries: OrderedDict[Hashable, object] = OrderedDict()
_lock = threading.Lock()


def find_faces_cached(
    image: np.ndarray, encoder: FaceEncoder, *, det_size: int | None = None, retry: bool = True
) -> Detections:
    """:func:`faces.detect.find_faces`, once per picture, detector and settings."""
    size = det_size or encoder.det_size
    key = ("faces", picture_hash(image), encoder.fingerprint.detector_sha256, size, retry)
    return _remember(key, lambda: find_faces(image, encoder, det_size=size, retry=retry))


def embed_cached(aligned: list[np.ndarray], encoder: FaceEncoder) -> list[np.ndarray]:
    """Raw embeddings float32 ``[D]`` of aligned faces uint8 ``[112, 112, 3]``; the unknown ones in one batch."""
    keys = [("embedding", picture_hash(face), encoder.fingerprint.recogniser_sha256) for face in aligned]
    known = {key: value for key in keys if isinstance(value := _recall(key), np.ndarray)}
    missing = {key: face for key, face in zip(keys, aligned) if key not in known}
    if missing:
        known.update(zip(missing, encoder.embed(np.stack(list(missing.values())))))
        for key in missing:
            _store(key, known[key])
    return [known[key].copy() for key in keys]


def picture_hash(image: np.ndarray) -> str:
    """sha256 over an array's shape, type and bytes."""
    digest = hashlib.sha256(f"{image.dtype}{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def clear_face_cache() -> int:
    """Forget everything; returns how many entries there were."""
    with _lock:
        count = len(_entries)
        _entries.clear()
    return count


def _remember(key: Hashable, compute: Callable[[], T]) -> T:
    found = _recall(key)
    if found is None:
        found = compute()
        _store(key, found)
    return found  # type: ignore[return-value]


def _recall(key: Hashable) -> object | None:
    with _lock:
        if key not in _entries:
            return None
        _entries.move_to_end(key)
        return _entries[key]


def _store(key: Hashable, value: object) -> None:
    with _lock:
        _entries[key] = value
        while len(_entries) > MAX_ENTRIES:
            _entries.popitem(last=False)
