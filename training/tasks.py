"""From a configuration to its data and its method."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from .autoencoder_task import AutoencoderTask
from .base import BaseModel, load_base
from .config import TrainConfig
from .denoiser_task import DenoiserTask
from .fusion_task import FusionTask
from .guidance_task import GuidanceTask
from .shards import ShardSource
from .source import Source
from .task import Task

logger = logging.getLogger("fusedid")
METHODS: dict[str, Callable[[TrainConfig, BaseModel], Task]] = {
    "fusion": FusionTask,
    "denoiser": DenoiserTask,
    "autoencoder": AutoencoderTask,
}


def open_sources(config: TrainConfig) -> tuple[Source, Source | None]:
    """The `train` and `val` splits of the prepared data; None without a validation split.

    Raises ValueError when the folder is no prepared data set or holds nothing to train on.
    """
    train = ShardSource(config.data.root, "train")
    try:
        return train, ShardSource(config.data.root, "val")
    except ValueError:  # the data set itself has just been opened, so only the split can be missing
        if config.validation.samples > 0:
            logger.warning("%s has no validation split; this run is not validated", config.data.root)
        return train, None


def open_task(config: TrainConfig, source: Source) -> Task:
    """Loads the base model and builds the method around it. New weights depend on the seed alone."""
    base = load_base(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.method == "guidance":
            return GuidanceTask(config, base, source)
        return METHODS[config.method](config, base)
