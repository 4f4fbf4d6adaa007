"""Checkpoints for exact resume: written under a temporary name, renamed when complete, the newest found again.

accelerate writes weights, optimizer, scaler and every rank's generators; `train_state.json` says where the run stands.
Frozen weights are left out. All processes must see the same folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .task import Task

logger = logging.getLogger("fusedid")
STATE_FILE = "train_state.json"
WEIGHTS_FILE = "trained.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands. `position` is the place in the sample stream, independent of how many processes there are."""

    step: int
    position: int
    config_hash: str
    data_fingerprint: str
    method: str
    world_size: int
    versions: dict[str, str]


def keep_frozen_weights_out(accelerator: Accelerator, task: Task) -> None:
    """Makes accelerate save and load the trained weights only (FSDP and DeepSpeed save their own way)."""
    names = [name for name, _ in task.trainable()]

    def save(models: list[Any], weights: list[Mapping[str, torch.Tensor]], folder: str) -> None:
        if weights and accelerator.is_main_process:
            state = accelerator.unwrap_model(models[0]).state_dict()
            save_file({name: state[name].detach().cpu().contiguous() for name in names}, Path(folder) / WEIGHTS_FILE)
        weights.clear()

    def load(models: list[Any], folder: str) -> None:
        while models:
            weights = load_file(Path(folder) / WEIGHTS_FILE)
            accelerator.unwrap_model(models.pop()).load_state_dict(weights, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, folder: Path, state: TrainState, *, keep: int) -> Path | None:
    """Writes `folder/step_<n>` and removes the oldest beyond `keep`.

    Returns None, after a logged error, when it could not be written (disk full): the run goes on with what it has in
    memory, the previous checkpoint stays, and the next attempt comes as usual.
    """
    final = folder / f"step_{state.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    failure = _try_to_write(accelerator, temporary, state)
    failures = accelerator.reduce(torch.tensor(float(failure is not None), device=accelerator.device), "sum")
    if float(failures) > 0:
        logger.error(
            "checkpoint %s could not be written (%s). The earlier checkpoints are untouched and training goes on; free "
            "space before the next one",
            final,
            failure or "another process failed",
        )
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        return None
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def _try_to_write(accelerator: Accelerator, folder: Path, state: TrainState) -> Exception | None:
    try:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        return error
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / STATE_FILE).is_file())


def load_checkpoint(accelerator: Accelerator, path: Path, expected: TrainState) -> TrainState:
    """Restores everything from a checkpoint.

    Raises ValueError when it belongs to another method or other data: going on would silently be another run.
    """
    state = TrainState(**json.loads((path / STATE_FILE).read_text(encoding="utf-8")))
    for name, what in (("method", "another method"), ("data_fingerprint", "other data")):
        if getattr(state, name) != getattr(expected, name):
            raise ValueError(
                f"{path} was trained with {what} ({getattr(state, name)[:16]}, now {getattr(expected, name)[:16]}). "
                "Choose another run folder, and checkpoint.init_from to start from its weights"
            )
    if state.config_hash != expected.config_hash:
        logger.warning("%s was trained with other settings; this run goes on with the new ones", path)
    accelerator.load_state(str(path))
    return state
