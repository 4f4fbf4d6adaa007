"""What the training loop needs from a method: a model, samples, a loss per sample, and a file at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .data import Draw, Sample
from .source import Source


@dataclass(frozen=True)
class RunFacts:
    """What the output file says about the run that made it."""

    samples_seen: int
    metadata: dict[str, str]
    """Training configuration and its hash, data fingerprint, library versions: copied into the file as they are."""
    base_hash: str
    encoder: str


class Task(Protocol):
    """One method (METHOD 1.5 or 2.5)."""

    @property
    def model(self) -> nn.Module:
        """What the engine wraps: its forward pass is the only thing that gradients flow through."""

    @property
    def draw(self) -> Draw:
        """Makes training samples."""

    @property
    def score_draw(self) -> Draw:
        """Makes validation samples: nothing dropped, nothing augmented."""

    def to_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Frozen parts to the device and precision; trained weights stay fp32."""

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Name in `model` and weight of everything that learns."""

    def losses(self, model: nn.Module, batch: Sample) -> Tensor:
        """Loss of every sample `[B]`, fp32. `model` is `self.model` as the engine wrapped it."""

    def enable_checkpointing(self) -> None:
        """Trade time for memory in the backward pass."""

    def compile(self) -> None:
        """torch.compile the repeated blocks."""

    def load(self, path: Path) -> None:
        """Start from the weights of an output file. Raises ValueError when it does not fit."""

    def save(self, folder: Path, weights: Mapping[str, Tensor], facts: RunFacts) -> Path:
        """Writes the file the node loads from trained weights by name; returns its path."""

    def pictures(self, source: Source, path: Path) -> dict[str, float]:
        """Draws validation pictures into a file; returns their scores, empty without a face pack."""
