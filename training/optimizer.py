"""The optimizer of a run: AdamW in fp32, or with 8-bit states where bitsandbytes is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .config import TrainConfig


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over exactly these parameters."""
    options: dict[str, Any] = {
        "lr": config.peak_lr,
        "betas": config.optimizer.betas,
        "weight_decay": config.optimizer.weight_decay,
        "eps": config.optimizer.eps,
    }
    if config.optimizer.name == "adamw8bit":
        return _bitsandbytes().optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("optimizer.name=adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes


def set_lr(optimizer: Any, lr: float) -> None:
    """The learning rate of the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
