"""One run of the host's sampler: whose prompts are sampled, percents as noise levels, what lasts until its end.

It lives in the options of that run alone, so nothing of it outlasts the run, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from ...attention.schedule import Window
from .prompts import GuiderPrompts, Prompt

SAMPLING = "fusedid_sampling"
"""Where the run's transformer_options hold its `Sampling`."""
STEP = "fusedid_step"
"""Where a step's transformer_options hold its `Step`."""

Kept = TypeVar("Kept")


@dataclass(frozen=True, eq=False)
class Step:
    """What one evaluation of prompts is about: latents `[B, 4, h, w]`, and the prompts by position and uuid."""

    x: Tensor
    prompts: dict[tuple[int, Any], Prompt]


@dataclass(eq=False)
class Sampling:
    """prompts: the guider's. latent_hw: size of what is sampled. x: the last latents of that size that were evaluated.

    The host copies options deeply, and a copy of a run is the run.
    """

    prompts: GuiderPrompts
    latent_hw: tuple[int, int]
    x: Tensor | None = None
    _windows: dict[tuple[Any, float, float], Window] = field(default_factory=dict)
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Sampling:
        return self

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """`make()`, once in this run."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def window(self, base: Any, start: float, end: float) -> Window:
        """Noise levels between two fractions of the run, by the schedule that is sampled with.

        Not earlier: nodes that come after ours may change the model's schedule.
        """
        key = (base, start, end)
        if key not in self._windows:
            sampling = base.model_sampling
            # At the very start and end, whatever a sampler or another node does beyond the schedule is inside.
            first = float("inf") if start == 0.0 else float(sampling.percent_to_sigma(start))
            last = 0.0 if end == 1.0 else float(sampling.percent_to_sigma(end))
            self._windows[key] = Window(first, last)
        return self._windows[key]


def note_run(executor: Any, *given: Any, **named: Any) -> Any:
    """An OUTER_SAMPLE wrapper. The guider's options belong to this run: the host restores them afterwards."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    options[SAMPLING] = Sampling(GuiderPrompts(guider), size_of(given[0]))
    try:
        return executor(*given, **named)
    finally:
        options.pop(SAMPLING, None)


def noted_step(options: dict[str, Any], conds: Any, x: Tensor) -> dict[str, Any]:
    """The transformer_options of a step, with what its prompts are. Unchanged outside a run."""
    sampling = options.get(SAMPLING)
    if sampling is None:
        return options
    if size_of(x) == sampling.latent_hw:
        sampling.x = x
    return {**options, STEP: Step(x, sampling.prompts.read(conds))}


def size_of(latents: Tensor) -> tuple[int, int]:
    """(h, w) of latents `[..., h, w]`."""
    return latents.shape[-2], latents.shape[-1]
