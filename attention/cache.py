"""Keys and values of reference faces, kept between steps, seeds, prompts and runs; in which form says `storage.py`.

Bounded in MiB, least recently used first out. The key names everything the values depend on, so an entry is never
stale; what no longer occurs ages out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .training_free import Statistics

MIB = 2**20


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """What one reference contributes at one site: keys and values `[1, N, C]`, N tokens of an (h, w) grid."""

    key: Tensor
    value: Tensor
    num_trained: int
    """Tokens this site had per reference in training (the N_trained of the length term)."""
    statistics: Statistics | None = None
    """Of the reference's own queries and keys, where the features come from self-attention."""
    log_size: Tensor | None = None
    """`[N]`, where tokens were merged: log of how many each stands for."""
    merged_from: int | None = None
    """How many tokens there were before merging."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the reference; merged ones count as what they stand for."""
        return self.key.shape[1] if self.merged_from is None else self.merged_from

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that takes memory."""
        more = () if self.statistics is None else self.statistics.tensors
        return (self.key, self.value, *more, *(() if self.log_size is None else (self.log_size,)))

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerFeatures:
        """The same features elsewhere."""
        return replace(self, key=self.key.to(device, dtype), value=self.value.to(device, dtype))


@dataclass(frozen=True, eq=False)
class ReferenceFeatures:
    """All sites of one reference: LDM path -> features."""

    layers: dict[str, LayerFeatures]

    def to(self, device: torch.device, dtype: torch.dtype) -> ReferenceFeatures:
        """The same features elsewhere."""
        return ReferenceFeatures({path: layer.to(device, dtype) for path, layer in self.layers.items()})

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return num_bytes(t for layer in self.layers.values() for t in layer.tensors)


class Entry(Protocol):
    """What the cache keeps."""

    @property
    def num_bytes(self) -> int:
        """Its memory."""
        ...


Kept = TypeVar("Kept", bound=Entry)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class CacheStats:
    """What a report shows."""

    entries: int
    mib: float
    budget_mib: float
    hits: int
    misses: int


class ReferenceCache(Generic[Kept]):
    """LRU of references' features, bounded in MiB. Thread-safe: of threads that ask for one key at once, one computes.

    An entry larger than the whole budget is computed and handed out but not kept: the run that asked holds it.
    """

    def __init__(self, budget_mib: float) -> None:
        self._entries: OrderedDict[Hashable, Kept] = OrderedDict()
        self._running: dict[Hashable, Future[Kept]] = {}
        self._lock = threading.RLock()
        self._budget = budget_mib * MIB
        self._hits = 0
        self._misses = 0

    def get(self, key: Hashable, compute: Callable[[], Kept]) -> Kept:
        """The entry for `key`, computed if absent. `compute` may ask for other keys, not for its own."""
        while True:
            with self._lock:
                if key in self._entries:
                    self._hits += 1
                    self._entries.move_to_end(key)
                    return self._entries[key]
                others = self._running.get(key)
                if others is None:
                    self._misses += 1
                    mine = self._running[key] = Future()
                    break
            if others.exception() is None:  # waits; where another thread failed or was interrupted, this one tries
                with self._lock:
                    self._hits += 1
                return others.result()
        return self._compute(key, compute, mine)

    def _compute(self, key: Hashable, compute: Callable[[], Kept], result: Future[Kept]) -> Kept:
        try:
            features = compute()
        except BaseException as error:
            with self._lock:
                del self._running[key]
            result.set_exception(error)
            raise
        with self._lock:
            del self._running[key]
            if features.num_bytes <= self._budget:
                self._entries[key] = features
                self._shrink()
        result.set_result(features)
        return features

    def set_budget(self, budget_mib: float) -> None:
        """Changes the bound; entries over it leave at once."""
        with self._lock:
            self._budget = budget_mib * MIB
            self._shrink()

    def drop(self, matches: Callable[[Hashable], bool]) -> int:
        """Forgets every entry whose key matches; returns how many."""
        with self._lock:
            gone = [key for key in self._entries if matches(key)]
            for key in gone:
                del self._entries[key]
        return len(gone)

    def num_bytes(self, matches: Callable[[Hashable], bool]) -> int:
        """Memory of the entries whose key matches."""
        with self._lock:
            return sum(entry.num_bytes for key, entry in self._entries.items() if matches(key))

    def stats(self) -> CacheStats:
        """Counts for the self-check report."""
        with self._lock:
            used = sum(entry.num_bytes for entry in self._entries.values()) / MIB
            return CacheStats(len(self._entries), used, self._budget / MIB, self._hits, self._misses)

    def _shrink(self) -> None:
        used = sum(entry.num_bytes for entry in self._entries.values())
        while self._entries and used > self._budget:
            _, oldest = self._entries.popitem(last=False)
            used -= oldest.num_bytes
