"""Units spread over a Ray cluster by Ray Data. All machines must see the output: a network disk, S3 ..."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import PrepareConfig
from .stage import Context
from .unit import Unit, UnitError, UnitResult, run_unit, start_worker

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("fusedid")


class RayExecutor:
    """Starts Ray here, or joins the cluster at ``run.ray_address``, when the first unit comes."""

    def __init__(self, config: PrepareConfig, workers: int) -> None:
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "run.executor is 'ray' but Ray Data is not installed; run: pip install 'ray[data]', or use the default "
                "executor 'processes'"
            ) from error
        self.workers = workers
        self._config = config
        self._started = False

    def run(self, units: Sequence[Unit]) -> Iterator[UnitResult]:
        if not units:
            return
        import ray.data

        self._start()
        settings = with_absolute_paths(self._config).model_dump_json()
        rows = [{"unit": asdict(unit), "settings": settings} for unit in units]
        # One block per unit: a unit is what is retried when a machine is lost.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        done = dataset.map(run_row, num_cpus=1)
        for row in done.iter_rows():
            if row["error"]:
                raise UnitError(row["error"], bool(row["disk_full"]))
            yield UnitResult(Unit(**row["unit"]), int(row["items"]), float(row["seconds"]))

    def _start(self) -> None:
        if self._started:
            return
        import ray

        folder = Path(__file__).resolve().parents[2]
        packages = [str(folder / name) for name in ("training", "faces", "attention")]
        options: dict[str, Any] = {"num_cpus": self.workers} if self._config.run.ray_address is None else {}
        if not ray.is_initialized():
            ray.init(
                address=self._config.run.ray_address,
                # Workers import these packages by name wherever they run.
                runtime_env={"py_modules": packages},
                log_to_driver=False,
                logging_level=logging.WARNING,
                include_dashboard=False,
                **options,
            )
            self._started = True
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.DataContext.get_current().execution_options.preserve_order = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            import ray

            ray.shutdown()


def with_absolute_paths(config: PrepareConfig) -> PrepareConfig:
    """The same settings for processes that run in another folder."""
    faces = config.faces.model_copy(update={"roots": tuple(map(_absolute, config.faces.roots))})
    paths = {"input": tuple(map(_absolute, config.input)), "output": _absolute(config.output)}
    return config.model_copy(update={**paths, "faces": faces})


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().resolve())


def run_row(row: dict[str, Any]) -> dict[str, Any]:
    """One unit on a Ray worker. The user's errors come back as data: Ray would bury them in its own."""
    start_worker()
    unit = Unit(**row["unit"])
    try:
        result = run_unit(Context(PrepareConfig.model_validate_json(row["settings"])), unit)
    except UnitError as error:
        return {"unit": asdict(unit), "items": 0, "seconds": 0.0, "error": error.message, "disk_full": error.disk_full}
    items, seconds = result.items, result.seconds
    return {"unit": asdict(unit), "items": items, "seconds": seconds, "error": "", "disk_full": False}
