"""The learning rate as a pure function of the step, so that it needs no state to resume and no world size."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def lr_factor(step: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate at step `step` (from 0): linear warm-up, then constant or cosine to 0."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.decay == "constant":
        return 1.0
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
