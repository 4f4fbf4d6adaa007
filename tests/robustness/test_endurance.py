"""Hundreds of mixed generations in one process: flat memory, nothing that grows, and results as on the first day.

60 in every run; `FUSEDID_ENDURANCE=1000 python -m pytest tests/robustness/test_endurance.py` runs 1000.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from fusion_lab import FusionLab
from jobs import FREE, ONE, PAIR, PLAIN, Job

RUNS = int(os.environ.get("FUSEDID_ENDURANCE", "60"))
WARM_UP = max(30, RUNS // 5)
CHECK_EVERY = 50
ALLOWED_GROWTH = 0.02
CACHE_MIB = 4
"""So little that the reference cache is full, and drops entries, before the end of the warm-up."""
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "ddim", "lcm", "heun")
SCHEDULERS = ("normal", "karras", "simple")
LATENTS = ((8, 8), (8, 12), (12, 8), (9, 13))
FAULTS = ("interrupt", "exception", "bad mask", "bad adapter", "bad number")


@dataclass(frozen=True)
class Footprint:
    """What a process that leaks would have more and more of; all but the last without the reference cache."""

    resident: int
    tensors: int
    threads: int
    handles: int
    cached_mib: float


def footprint(lab: FusionLab) -> Footprint:
    cache = lab.pack.submodule("nodes.reference_cache").CACHE
    cached = cache.stats().mib
    cache.drop(lambda _: True)  # bounded by its budget: what grows without being in it is a leak
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that only what is held counts
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Footprint(
        resident=pages * os.sysconf("SC_PAGE_SIZE"),
        tensors=sum(isinstance(entry, torch.Tensor) for entry in gc.get_objects()),
        threads=threading.active_count(),
        handles=len(list(Path("/proc/self/fd").iterdir())),
        cached_mib=cached,
    )


def random_job(rng: random.Random) -> Job:
    """Any combination a user may queue."""
    return Job(
        kind=rng.choices([PLAIN, ONE, PAIR, FREE], [1, 4, 3, 1])[0],
        people=tuple(rng.sample(range(40), 2)),
        latent=rng.choice(LATENTS),
        seed=rng.randrange(1 << 30),
        steps=rng.choice([1, 1, 2]),
        sampler=rng.choice(SAMPLERS),
        scheduler=rng.choice(SCHEDULERS),
        strength=rng.choice([0.0, 0.5, 1.0, 2.0]),
        timestep=rng.choice(["clean", "clean", "matched"]),
        combine=rng.choice(["fused", "decoupled"]),
        batch=rng.choice([1, 1, 2]),
    )


def go_wrong(lab: FusionLab, job: Job, fault: str) -> None:
    """The same job, but something fails; whatever it was must leave no trace."""
    import comfy.model_management as management

    if fault in ("interrupt", "exception"):

        def act(*_: Any) -> None:
            if fault == "interrupt":
                management.interrupt_current_processing(True)
            else:
                raise RuntimeError("another pack failed")

        handle = lab.unet.register_forward_pre_hook(act)
        try:
            with pytest.raises((RuntimeError, management.InterruptProcessingException)):
                jobs.sampled(lab, job)
                management.throw_exception_if_processing_interrupted()
        finally:
            handle.remove()
        return
    with pytest.raises(ValueError, match=r"FusedIDAttentionPatch|MultiIDMaskRouter"):
        if fault == "bad mask":
            lab.routed([lab.identity(1)], [torch.full((64, 64), torch.nan)])
        elif fault == "bad adapter":
            lab.patch(adapter="gone.safetensors")
        else:
            lab.patch(strength=float("nan"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_mixed_generations_leave_no_trace(pack: Any, small_models: Any, tmp_path: Path) -> None:
    lab, rng = FusionLab(pack, small_models, jobs.LAYOUT), random.Random(1)
    cache = pack.submodule("nodes.reference_cache").CACHE
    budget = cache.stats().budget_mib
    cache.set_budget(CACHE_MIB)
    warm = footprint(lab)
    failed = 0
    try:
        for number in range(1, RUNS + 1):
            job = random_job(rng)
            if rng.random() < 0.15:
                go_wrong(lab, job, rng.choice(FAULTS))
                failed += 1
            result = jobs.sampled(lab, job)
            assert bool(torch.isfinite(result).all()), job
            if number % CHECK_EVERY == 0:
                (wanted,) = jobs.in_fresh_process(pack.host, [job], tmp_path)
                assert torch.equal(result, wanted), f"generation {number} is not that of a fresh process: {job}"
            del result
            if number == WARM_UP:
                warm = footprint(lab)
        end = footprint(lab)
    finally:
        cache.set_budget(budget)
    assert failed > 0 and warm.cached_mib > CACHE_MIB / 2, "neither errors nor a full cache: this shows nothing"
    told = f"after {WARM_UP} of {RUNS}: {warm}; at the end: {end}"
    assert end.resident <= warm.resident * (1 + ALLOWED_GROWTH), told
    assert end.tensors <= warm.tensors * (1 + ALLOWED_GROWTH), told
    assert end.cached_mib <= CACHE_MIB, told
    assert end.threads <= warm.threads and end.handles <= warm.handles, told
