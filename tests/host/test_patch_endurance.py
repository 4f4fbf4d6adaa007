"""100 patched generations in one process leave memory and the number of live tensors where they were after the 5th."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import fusion_lab
import torch
from fusion_lab import FusionLab

GENERATIONS, WARM_UP = 100, 5
ALLOWED_GROWTH = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(entry, torch.Tensor) for entry in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_100_patched_generations_leave_memory_and_live_tensors_where_they_were(pack: Any, small_models: Any) -> None:
    lab = FusionLab(pack, small_models, "sd15_tiny")
    people, masks = [lab.identity(3), lab.identity(4)], fusion_lab.halves()
    after_warm_up = (0, 0)
    for number in range(GENERATIONS):
        if number % 4 == 3:
            patched, _ = lab.patch(routed=lab.routed(people, masks), strength=0.5)
        else:
            modes = ("clean", "matched")
            patched, _ = lab.patch(identity=people[number % 2], timestep=modes[number % 3 == 1])
        lab.sample(patched, steps=1, seed=number)
        del patched
        if number + 1 == WARM_UP:
            after_warm_up = live_tensors(), resident()
    tensors, memory = live_tensors(), resident()
    assert tensors <= after_warm_up[0] * (1 + ALLOWED_GROWTH)
    assert memory <= after_warm_up[1] * (1 + ALLOWED_GROWTH)
