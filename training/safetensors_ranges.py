"""One tensor out of a safetensors file by byte range, so that a remote cache file is never read whole."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from .storage import Store

_DTYPES = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}
LARGEST_HEADER = 100_000_000


class TensorFile:
    """The header of a safetensors file; tensors are read when asked for. ``ValueError`` when it is damaged."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        size = int.from_bytes(store.read_range(path, 0, 8), "little")
        try:
            if not 0 < size <= LARGEST_HEADER:
                raise ValueError("the header's length is impossible")
            self._entries: dict[str, Any] = json.loads(store.read_range(path, 8, size))
        except ValueError as error:
            raise ValueError(
                f"{store.root}/{path} is no safetensors file ({error}); run the preparation again"
            ) from error
        self._start = 8 + size

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries) - {"__metadata__"}

    def tensor(self, name: str) -> Tensor:
        """A tensor that owns its memory."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"{self._store.root}/{self._path} has no entry {name!r}; run the preparation again")
        start, end = entry["data_offsets"]
        data = self._store.read_range(self._path, self._start + start, end - start)
        if len(data) < end - start:
            raise ValueError(f"{self._store.root}/{self._path} is cut off; run the preparation again")
        return torch.frombuffer(bytearray(data), dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
