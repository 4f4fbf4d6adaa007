"""Generations described by plain values, so that a fresh process can make the same one.

As a script: `python jobs.py <checkout> <base> <jobs.json> <results.safetensors>`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = "sd15_tiny"
PLAIN, ONE, PAIR, FREE = "plain", "one person", "two people", "training-free"


@dataclass(frozen=True)
class Job:
    """One run of the host's KSampler. people: seeds of the identities. latent: (height, width) in latent pixels."""

    kind: str = PLAIN
    people: tuple[int, ...] = (1,)
    latent: tuple[int, int] = (8, 8)
    seed: int = 7
    steps: int = 1
    sampler: str = "euler"
    scheduler: str = "normal"
    strength: float = 1.0
    timestep: str = "clean"
    combine: str = "fused"
    batch: int = 1


def patched(lab: Any, job: Job, model: Any = None) -> Any:
    """The MODEL of a job."""
    import fusion_lab

    if job.kind == PLAIN:
        return model or lab.model
    settings: dict[str, Any] = {"strength": job.strength}
    if job.kind == FREE:
        settings |= {"adapter": "training-free", "reference_size": 64}
    else:
        settings |= {"timestep": job.timestep, "combine": job.combine}
    people = [lab.identity(seed) for seed in job.people]
    if job.kind == PAIR:
        settings["routed"] = lab.routed(people[:2], fusion_lab.halves())
    else:
        settings["identity"] = people[0]
    return lab.patch(model, **settings)[0]


def sampled(lab: Any, job: Job, model: Any = None) -> torch.Tensor:
    """Its result `[batch, 4, h, w]`."""
    import torch

    return lab.sample(
        patched(lab, job, model),
        latent=torch.zeros(job.batch, 4, *job.latent),
        seed=job.seed,
        steps=job.steps,
        sampler_name=job.sampler,
        scheduler=job.scheduler,
    )


def in_fresh_process(host: Any, jobs: Sequence[Job], folder: Path) -> list[torch.Tensor]:
    """The jobs' results, made in one new process in which nothing else ever ran."""
    from safetensors.torch import load_file

    wanted, results = folder / "jobs.json", folder / "results.safetensors"
    wanted.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    command = [sys.executable, str(Path(__file__)), str(host.path), str(host.base), str(wanted), str(results)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(results)
    return [found[str(number)] for number in range(len(jobs))]


def open_lab(checkout: Path, base: Path) -> Any:
    """The small model with our pack in the real host, in this process."""
    sys.path += [str(ROOT), str(ROOT / "tests" / "host")]
    import cpu_torch

    cpu_torch.install()
    import comfy_host
    from small_models import SmallModels

    pack = comfy_host.load_pack(comfy_host.import_host(checkout, base), ROOT)
    from fusion_lab import FusionLab

    return FusionLab(pack, SmallModels(base / "models"), LAYOUT)


def main(checkout: str, base: str, wanted: str, results: str) -> None:
    from safetensors.torch import save_file

    lab = open_lab(Path(checkout), Path(base))
    rows = [Job(**{**row, "people": tuple(row["people"])}) for row in json.loads(Path(wanted).read_text("utf-8"))]
    save_file({str(number): sampled(lab, job).contiguous() for number, job in enumerate(rows)}, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
