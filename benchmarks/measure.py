"""Interleaved timing: every round runs every case once, and only ratios within a round are compared."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


@dataclass
class Timing:
    """One case: seconds per round, and the largest memory seen while it ran (MiB; None where it cannot be read)."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    def ratios(self, base: Timing) -> list[float]:
        """Round by round, so that a machine that slows down between rounds does not count."""
        return [mine / other for mine, other in zip(self.seconds, base.seconds)]


def clock(device: str) -> float:
    """Seconds. On a CPU those this process computed for: what other programs take of the machine does not count."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    cases: Mapping[str, Callable[[], float]], rounds: int, device: str, progress: Callable[[str], None]
) -> dict[str, Timing]:
    """Runs every case `rounds` times in turn. A case, already warm, returns the seconds to count."""
    timings = {name: Timing() for name in cases}
    for number in range(1, rounds + 1):
        for name, case in cases.items():
            forget_peak(device)
            timings[name].seconds.append(case())
            timings[name].peak_mib = max(timings[name].peak_mib or 0.0, peak_mib(device) or 0.0) or None
        progress(f"round {number} of {rounds}")
    return timings


def forget_peak(device: str) -> None:
    """Starts a new measurement of the largest memory."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


def peak_mib(device: str) -> float | None:
    """Largest memory since `forget_peak`: allocated on the GPU; resident in RAM, on Linux only."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def spread(ratios: list[float]) -> float:
    """Half of what lies between the quartiles: how far the middle half of the rounds is from the median."""
    if len(ratios) < 2:
        return 0.0
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return (high - low) / 2


def machine(device: str) -> dict[str, Any]:
    """Processor, threads and versions, for whoever reads the numbers."""
    import platform

    names = [line for line in _cpuinfo() if line.startswith("model name")]
    processor = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    return {
        "device": gpu or f"{processor}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "command": " ".join(["python -m benchmarks.overhead", *_public(sys.argv[1:])]),
    }


def _public(arguments: list[str]) -> list[str]:
    """The command line without the folder of somebody's checkout."""
    after_path = {i + 1 for i, argument in enumerate(arguments) if argument == "--comfyui"}
    return ["PATH" if i in after_path else argument for i, argument in enumerate(arguments)]


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
