"""What a stage is, and when its result on disk is still good: its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from training.storage import Store, open_store

from .config import PrepareConfig
from .listing import open_input
from .tables import Row, read_marks

Tables = Mapping[str, list[Row]]


@dataclass
class Context:
    """What stages may use: the settings and the stores. Cheap to send to another process."""

    config: PrepareConfig

    @cached_property
    def output(self) -> Store:
        return open_store(self.config.output)

    @cached_property
    def inputs(self) -> list[Store]:
        return [open_input(path) for path in self.config.input]

    def read_input(self, root: int, location: Row) -> bytes:
        """The bytes of an input file or archive member. Raises ``OSError``."""
        store = self.inputs[root]
        if location["offset"] < 0:
            return store.read(location["path"])
        return store.read_range(location["path"], location["offset"], location["size"])

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}


@dataclass(frozen=True)
class Stage:
    """One step. Results are tables of one row per picture, in the order of the first of ``needs``."""

    name: str
    version: int
    """Raise it whenever the code gives another result for the same input."""
    needs: tuple[str, ...]
    """Stages whose results it reads; all have the same shards."""
    schema: pa.Schema
    options: Callable[[PrepareConfig], Any]
    """The settings the result depends on, and nothing else."""
    each: Callable[[Context, Tables, int], list[Row]] | None = None
    """Works on one shard."""
    whole: Callable[[Context, Mapping[str, pa.Table]], pa.Table] | None = None
    """Works on all shards at once; gives one row per input row."""
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """For ``whole``: the columns it wants of each needed stage."""
    rows_per_shard: Callable[[PrepareConfig], int] | None = None
    """For ``whole``: cut the result into shards of its own, not into those of what it reads."""
    alone: bool = False
    """Runs in the main process, which owns the accelerator."""
    products: Callable[[PrepareConfig, int], tuple[str, ...]] = lambda config, shard: ()
    """Files which the stage writes beside its table and which must exist for the result to count."""


def fingerprint(stage: Stage, config: PrepareConfig, inputs: Sequence[str]) -> str:
    """sha256 of everything a result depends on: code version, options, model files, and what it reads."""
    parts = [stage.name, stage.version, stage.options(config), list(inputs)]
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(canonical.encode()).hexdigest()


def input_digests(stage: Stage, store: Store, shards: Sequence[int]) -> list[str]:
    """Content digests of what a stage reads for these shards. All of it must exist."""
    digests = []
    for need in stage.needs:
        for shard in shards:
            marks = read_marks(store, need, shard)
            if marks is None:
                raise AssertionError(f"stage {stage.name} is run before {need} is finished for shard {shard}")
            digests.append(marks[1])
    return digests


def is_done(stage: Stage, context: Context, shard: int, wanted: str) -> bool:
    """Whether the shard's result on disk has the wanted fingerprint and nothing that belongs to it is missing."""
    marks = read_marks(context.output, stage.name, shard)
    if marks is None or marks[0] != wanted:
        return False
    return all(context.output.exists(path) for path in stage.products(context.config, shard))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)
