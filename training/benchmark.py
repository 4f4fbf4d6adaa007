"""`python -m training.benchmark`: speed and peak memory of a training step, and the speed of preparing photos.

    python -m training.benchmark                      # sd15 on a GPU; a small layout on the CPU
    python -m training.benchmark --family sdxl --resolution 1024 --batch 2
    python -m training.benchmark --photos PHOTOS --prepare-config training/configs/prepare_sd15.yaml

The step is the real one (reference pass, forward, backward, AdamW) with random weights, without data loading, VAE and
text encoder. Photos go through the whole of `training.prepare`, into a folder that is removed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention.adapter import AdapterSettings

from .config_io import load_config
from .cost import GIB, LAYOUTS, cpu_attention_flops, step_inputs
from .prepare.config import PrepareConfig
from .prepare.pipeline import prepare
from .unet import FusedUNet, Reference

SMALL: dict[str, Any] = {
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
WARMUP = 2


@dataclass(frozen=True)
class Result:
    """One measured step. peak_gib: 0 where the device does not say."""

    name: str
    seconds: float
    samples_per_second: float
    gflop_per_second: float
    peak_gib: float


def measure(
    family: str, resolution: int, *, batch: int, checkpointing: bool, device: str, steps: int, dtype: torch.dtype
) -> Result:
    """Mean of `steps` training steps after two that warm up."""
    model = _model(family, resolution, checkpointing, device, dtype)
    optimizer = torch.optim.AdamW([weight for _, weight in model.trainable()])
    layout = "sd15" if family == "small" else family
    noisy, t, context = step_inputs(layout, resolution, batch, make=lambda *shape: _noise(shape, device, dtype))
    faces = [Reference(_noise(noisy.shape, device, dtype), context)]

    def step() -> None:
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(noisy, t.to(device), context, faces).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARMUP):
        step()
    with FlopCounterMode(display=False, custom_mapping=cpu_attention_flops()) as counter:
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _timed(step, steps, device) / steps
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0.0
    name = f"{family} @{resolution} batch {batch}{' checkpointing' if checkpointing else ''}"
    return Result(name, seconds, batch / seconds, counter.get_total_flops() / 1e9 / seconds, peak)


def _timed(step: Any, steps: int, device: str) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return time.perf_counter() - started


def _noise(shape: Sequence[int], device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _model(family: str, resolution: int, checkpointing: bool, device: str, dtype: torch.dtype) -> FusedUNet:
    from diffusers import UNet2DConditionModel

    layout = SMALL if family == "small" else LAYOUTS[family]
    settings = AdapterSettings(base="custom", reference_size=resolution)
    with torch.device(device):
        model = FusedUNet(UNet2DConditionModel(**layout), settings)
    torch.nn.Module.to(model.unet, dtype=dtype)  # diffusers' own `to` warns although nothing is wrong
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model.train()


def table(results: Sequence[Result]) -> str:
    """Markdown of training steps."""
    lines = ["| step | s | samples/s | GFLOP/s | peak GiB |", "|---|---|---|---|---|"]
    for r in results:
        peak = f"{r.peak_gib:.2f}" if r.peak_gib else "-"
        lines.append(f"| {r.name} | {r.seconds:.3f} | {r.samples_per_second:.2f} | {r.gflop_per_second:.0f} | {peak} |")
    return "\n".join(lines) + "\n"


def prepare_table(photos: str, config: str | None, overrides: Sequence[str]) -> str:
    """Prepares a folder of photos; Markdown of every stage's speed. Raises ValueError as `training.prepare` does."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "prepared"
        paths = [f"input={json.dumps(photos)}", f"output={json.dumps(str(output))}"]
        prepare(load_config(PrepareConfig, config, [*paths, *overrides]), quiet=True)
        timings = json.loads((output / "report.json").read_text(encoding="utf-8"))["timings"]
    lines = ["| stage of prepare | pictures | s | img/s | img/s per core |", "|---|---|---|---|---|"]
    columns = ("stage", "pictures", "seconds", "per_second", "per_second_and_core")
    lines += ["| " + " | ".join(str(timing[name]) for name in columns) + " |" for timing in timings]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m training.benchmark", description="Speed of training and prepare.")
    parser.add_argument("--family", choices=("small", *LAYOUTS), default="sd15" if gpu else "small")
    parser.add_argument("--resolution", type=int, default=512 if gpu else 128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--photos", help="measure training.prepare on this folder instead of a training step")
    parser.add_argument("--prepare-config", type=Path, help="YAML file of training.prepare, with --photos")
    parser.add_argument("--set", action="append", default=[], help="section.field=value of training.prepare")
    options = parser.parse_args(arguments)
    try:
        if options.photos is not None:
            sys.stdout.write(prepare_table(options.photos, options.prepare_config, options.set))
        else:
            sys.stdout.write(table(measure_steps(options)))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def measure_steps(options: argparse.Namespace) -> list[Result]:
    """A step without and with checkpointing."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return [
        measure(
            options.family,
            options.resolution,
            batch=options.batch,
            checkpointing=checkpointing,
            device=options.device,
            steps=options.steps,
            dtype=dtype,
        )
        for checkpointing in (False, True)
    ]


if __name__ == "__main__":
    sys.exit(main())
