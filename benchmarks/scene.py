"""A random-weight model in the real host with people to show, and the time of one of its sampling steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .measure import clock

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "host"))  # the tests' small models and loader; last, as in tests/conftest.py

import comfy_host  # noqa: E402
import cpu_torch  # noqa: E402
import fusion_lab  # noqa: E402
import small_models  # noqa: E402

SIGMA = 3.0


def start_host(path: Path, base: Path, device: str) -> Any:
    """The pack, loaded by the host's own loader."""
    cpu_torch.install()
    host = comfy_host.import_host(path.resolve(), comfy_host.make_base(base), cpu=device == "cpu")
    return comfy_host.load_pack(host, ROOT)


class Scene(fusion_lab.FusionLab):
    """One model. size: side of the picture in pixels; the adapter is trained for references of `trained` pixels."""

    def __init__(self, pack: Any, layout: str, size: int, trained: int, device: str) -> None:
        dtype = torch.float32 if device == "cpu" else torch.float16
        models = small_models.SmallModels(pack.host.base / "models")
        super().__init__(pack, models, layout, dtype=dtype, reference_size=trained)
        self.size, self.device = size, device
        self.untimed, self.timed = (0, 1) if device == "cpu" else (1, 5)  # one step is too short for a GPU's clock

    def person(self, references: int = 1, seed: int = 0) -> Any:
        """An identity with so many references."""
        return self.identity(seed, weights=(1.0,) * references)

    def people(self, count: int, *, covered: float = 1.0, background: str = "all") -> Any:
        """Routed people side by side, each a column; together they cover this part of the picture."""
        masks = [torch.zeros(self.size, self.size) for _ in range(count)]
        edges = [round(i * self.size / count) for i in range(count + 1)]
        for mask, left, right in zip(masks, edges, edges[1:]):
            mask[: round(covered * self.size), left:right] = 1.0
        return self.routed([self.person(seed=i) for i in range(count)], masks, background=background)

    def step(self, model: Any, size: int = 0) -> float:
        """Seconds of one denoising step with guidance (two rows), inside a run of the host's sampler."""
        import comfy.samplers

        side = (size or self.size) // 8
        seconds: list[float] = []

        def timed(denoise: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: Any, **_: Any) -> Tensor:
            level = sigmas[0].expand(len(x))
            for _ in range(self.untimed):
                denoise(x, level, **extra_args)
            start = clock(self.device)
            for _ in range(self.timed):
                denoise(x, level, **extra_args)
            seconds.append((clock(self.device) - start) / self.timed)
            return x

        start = fusion_lab.noise(1, (side, side))
        sigmas = torch.tensor([SIGMA, 0.0])
        sampler = comfy.samplers.KSAMPLER(timed)
        self.run(model, sampler=sampler, sigmas=sigmas, noise=start, latent=torch.zeros_like(start))
        return seconds[0]

    def passes(self, model: Any, *, steps: int, seed: int) -> tuple[int, float]:
        """Reference passes (UNet calls with one row) and seconds of a whole run with a new seed and prompt."""
        positive = self._small_models.conditioning(self.layout, seed=seed)
        latent = torch.zeros(1, 4, self.size // 8, self.size // 8)
        with self.counted_passes() as rows:
            start = clock(self.device)
            self.sample(model, steps=steps, seed=seed, positive=positive, latent=latent)
            seconds = clock(self.device) - start
        return sum(count == 1 for count in rows), seconds
