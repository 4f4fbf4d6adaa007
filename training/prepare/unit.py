"""One unit of work: one stage on one shard. This is what runs in worker processes and on other machines."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass

from .config import PrepareConfig
from .stage import Context
from .tables import read_result, to_table, write_result

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Unit:
    """What to do; small enough to send anywhere."""

    stage: str
    shard: int
    fingerprint: str


@dataclass(frozen=True)
class UnitResult:
    unit: Unit
    items: int
    seconds: float


class UnitError(Exception):
    """A unit that could not be finished, in words for the user."""

    def __init__(self, message: str, disk_full: bool = False) -> None:
        super().__init__(message)
        self.message, self.disk_full = message, disk_full

    def __reduce__(self) -> tuple[type[UnitError], tuple[str, bool]]:
        return UnitError, (self.message, self.disk_full)


def run_unit(context: Context, unit: Unit) -> UnitResult:
    """Run a stage on one shard and write its result. Raises ``UnitError`` for the user's problems."""
    from .stages import BY_NAME

    stage = BY_NAME[unit.stage]
    assert stage.each is not None, "only stages that work shard by shard are sent to workers"
    start = time.perf_counter()
    try:
        tables = {need: read_result(context.output, need, unit.shard).to_pylist() for need in stage.needs}
        rows = stage.each(context, tables, unit.shard)
        write_result(context.output, stage.name, unit.shard, to_table(rows, stage.schema), unit.fingerprint)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UnitError(f"stage {unit.stage}: {error.strerror or error}", full) from error
    except ValueError as error:
        raise UnitError(f"stage {unit.stage}: {error}") from error
    return UnitResult(unit, len(rows), time.perf_counter() - start)


def start_worker() -> None:
    """Set a fresh worker process up: one thread per library, no messages of its own below warnings."""
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"
    logging.getLogger("fusedid").setLevel(logging.WARNING)


_context: Context | None = None


def start_local_worker(config: PrepareConfig) -> None:
    """``start_worker`` for a pool that hands the settings over once instead of with every unit."""
    global _context
    start_worker()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _context = Context(config)


def _end_with_parent() -> None:
    """A pool's processes outlive a parent that was killed, because they hold both ends of their queue."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_local_unit(unit: Unit) -> UnitResult:
    """``run_unit`` with the context of ``start_local_worker``."""
    assert _context is not None, "the pool's initializer has not run"
    return run_unit(_context, unit)
