"""Averaged weights: an exponential moving average over the trained parameters, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Shadow copies in fp32. `decay` None keeps none and costs nothing.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not dominated by its
    initial weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = list(parameters)
        self._shadow = [p.detach().float().clone() for p in self._parameters] if decay is not None else []

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        if self.decay is None:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._shadow, [p.detach().float() for p in self._parameters], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model holds the averaged weights."""
        if self.decay is None:
            yield
            return
        kept = [p.detach().clone() for p in self._parameters]
        self._fill(self._shadow)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "shadow": [tensor.cpu() for tensor in self._shadow]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint of a run with the same parameters. Raises ValueError when averaging was turned on since."""
        if len(state["shadow"]) != len(self._shadow):
            raise ValueError(
                f"the checkpoint holds {len(state['shadow'])} averaged weights, this run wants {len(self._shadow)}: "
                "keep ema.decay as it was, or begin a new run with checkpoint.init_from"
            )
        self.updates = state["updates"]
        for shadow, value in zip(self._shadow, state["shadow"]):
            shadow.copy_(value)
