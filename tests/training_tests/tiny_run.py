"""Configurations of runs that take seconds, and a script that trains one: `python tiny_run.py <options as JSON>`.

The script is its own process so that tests can kill it and start several with a launcher.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def settings(base: Path, run: Path, **changes: object) -> dict:
    """A configuration as a dict; `changes` are dotted names with `__` for the dot."""
    from training.config_io import set_value

    values: dict = {
        "run": str(run),
        "model": {"base": str(base)},
        "data": {"root": "memory", "resolution": 64, "workers": 0},
        "reference": {"size": 64},
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": 4, "warmup": 0, "batch_size": 2},
        "engine": {"precision": "fp32", "device": "cpu"},
        "checkpoint": {"every": 100},
        "validation": {"every": 100, "samples": 2, "timesteps": [100, 900]},
        "log": {"every": 1, "trackers": []},
    }
    for name, value in changes.items():
        set_value(values, name.split("__"), value)
    return values


def train_tiny(values: dict, *, num: int = 8, kill_at: int | None = None) -> Path | None:
    """Trains on drawn faces; with `kill_at` the process kills itself (SIGKILL) after that many steps."""
    from memory_source import MemorySource

    from training import train as module
    from training.config import TrainConfig
    from training.config_io import validate

    if kill_at is not None:
        whole = module.Trainer.train_step

        def step_or_die(self, stream):
            if self.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, stream)

        module.Trainer.train_step = step_or_die
    config = validate(TrainConfig, values, origin="test")
    return module.train(config, (MemorySource(num), MemorySource(3, prefix="v")))


def environment(folder: Path, **extra: str) -> Mapping[str, str]:
    """For a process of its own: our packages importable, one thread, and diffusers usable beside a CPU torch."""
    (folder / "site").mkdir(exist_ok=True)
    shim = ROOT / "tests" / "host" / "cpu_torch.py"
    (folder / "site" / "sitecustomize.py").write_text(shim.read_text(encoding="utf-8"), encoding="utf-8")
    paths = [str(folder / "site"), str(ROOT), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **extra}


def free_port() -> int:
    """For a launcher's processes to meet at; a fixed one may be in use by another run on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    train_tiny(options["values"], num=options.get("num", 8), kill_at=options.get("kill_at"))
