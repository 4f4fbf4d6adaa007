"""Validation loss at fixed noise and fixed timesteps: a curve that means something (plain training loss is flat)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import nn

from .config import TrainConfig
from .data import Sample, collate
from .randomness import generator
from .source import Source
from .task import Task

EPOCH = -1
"""The epoch number that stands for validation: its draws never coincide with training's."""


def chosen(num: int, samples: int, seed: int) -> list[int]:
    """Which samples of the validation split are scored: always the same ones."""
    return torch.randperm(num, generator=generator(seed, "validation"))[:samples].tolist()


@torch.no_grad()
def validation_losses(
    accelerator: Accelerator, task: Task, model: nn.Module, source: Source, config: TrainConfig
) -> dict[str, float]:
    """`loss`, and `loss_t<t>` per timestep. Every process scores its share; the result is the same on all."""
    options = config.validation
    indices = chosen(len(source), options.samples, config.seed)
    sums = torch.zeros(len(options.timesteps), dtype=torch.float64)
    was_training = model.training
    model.eval()
    # Every process makes the same number of forward passes, as sharded engines need; repeats count zero.
    rounds = -(-len(indices) // accelerator.num_processes)
    for number in range(rounds):
        at = number * accelerator.num_processes + accelerator.process_index
        sample = task.score_draw(source, indices[at % len(indices)], EPOCH)
        for i, timestep in enumerate(options.timesteps):
            batch = on_device(collate([sample | {"timestep": torch.tensor(timestep)}]), accelerator.device)
            sums[i] += float(task.losses(model, batch)[0]) * (at < len(indices))
    model.train(was_training)
    means = accelerator.reduce(sums.float().to(accelerator.device), "sum") / len(indices)
    by_timestep = {f"loss_t{t}": float(loss) for t, loss in zip(options.timesteps, means)}
    return {"loss": float(means.mean()), **by_timestep}


def on_device(batch: Mapping[str, object], device: torch.device) -> Sample:
    """The batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
