"""Where units run: here, in a pool of processes, or on a Ray cluster. All give the same results."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Protocol

from .config import PrepareConfig
from .stage import Context
from .unit import Unit, UnitError, UnitResult, run_local_unit, run_unit, start_local_worker

if TYPE_CHECKING:
    from typing_extensions import Self


class Executor(Protocol):
    """Runs units in any order and gives their results as they finish."""

    workers: int

    def run(self, units: Sequence[Unit]) -> Iterator[UnitResult]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_executor(config: PrepareConfig) -> Executor:
    """The executor that ``run.executor`` names; nothing is started before the first unit."""
    workers = config.run.workers or os.cpu_count() or 1
    if config.run.executor == "ray":
        from .ray_executor import RayExecutor

        return RayExecutor(config, workers)
    if config.run.executor == "inline" or workers == 1:
        return InlineExecutor(config)
    return ProcessExecutor(config, workers)


class InlineExecutor:
    """Everything in this process: for debugging, and for stores that only this process sees."""

    workers = 1

    def __init__(self, config: PrepareConfig) -> None:
        self._context = Context(config)

    def run(self, units: Sequence[Unit]) -> Iterator[UnitResult]:
        for unit in units:
            yield run_unit(self._context, unit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


class ProcessExecutor:
    """Processes of this machine, reused for all stages. Started fresh: onnxruntime does not survive a fork."""

    def __init__(self, config: PrepareConfig, workers: int) -> None:
        self.workers = workers
        self._config = config
        self._pool: ProcessPoolExecutor | None = None

    def run(self, units: Sequence[Unit]) -> Iterator[UnitResult]:
        if not units:
            return
        pool = self._started()
        waiting = {pool.submit(run_local_unit, unit) for unit in units}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (self._result(future) for future in finished)
        finally:
            for future in waiting:
                future.cancel()

    def _result(self, future: Future[UnitResult]) -> UnitResult:
        try:
            return future.result()
        except BrokenProcessPool as error:
            self._pool = None
            raise UnitError(
                "a worker process was killed, most often for lack of memory; try fewer workers (run.workers), a "
                "smaller pack.samples_per_shard or scan.max_pixels"
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=start_local_worker,
                initargs=(self._config,),
            )
        return self._pool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
