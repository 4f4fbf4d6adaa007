"""The run's log: one JSON object per line, always; tensorboard, wandb or trackio beside it through accelerate."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from .config import LogConfig

logger = logging.getLogger("fusedid")
Value = float | int | str | list[str]
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def tracker_names(options: LogConfig) -> list[str]:
    """The trackers to use. Raises ValueError when one asked for is not installed."""
    if options.trackers is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
    for name in options.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"log.trackers asks for {name}, which is not installed: pip install {PACKAGES[name]}")
    return list(options.trackers)


class RunLog:
    """Appends to `log.jsonl` from the main process and passes numbers on to the trackers."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self._accelerator = accelerator
        self._path = folder / "log.jsonl"
        self._warned = False

    def write(self, step: int, kind: str, values: Mapping[str, Value]) -> None:
        """One line: step, kind (`train`, `validation`, `checkpoint`, ...), wall time in seconds, and the values."""
        if not self._accelerator.is_main_process:
            return
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        self._append(json.dumps(line))
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        self._accelerator.log(numbers, step=step)

    def _append(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # a full disk must not end a run that can still train
            if not self._warned:
                logger.error("cannot write %s (%s); the run goes on without it", self._path, error)
            self._warned = True
