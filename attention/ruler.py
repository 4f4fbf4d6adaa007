"""The pixels of a picture's side, numbered; and from what others cut out and resized back to where they cut.

Legend: n samples along one side.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

STRAY = 1.5  # steps by which a sample may miss the straight line: nearest neighbours miss by less than one


def ruler(size: int) -> Tensor:
    """The numbers `[size]` of the pixels along a side, float32."""
    return torch.arange(size, dtype=torch.float32)


def span_on_ruler(samples_n: Tensor, size: int) -> tuple[float, float] | None:
    """The part of a side of `size` pixels, as fractions of it, whose numbers were cut out and resized to n samples.

    Exact where whole pixels were cut out and resized to their nearest neighbours; otherwise (the whole side was resized
    before, other filters) off by a fraction of a pixel. None for samples that are no part of a ruler: mirrored, rolled.
    """
    samples = samples_n.detach().double().cpu()
    num = len(samples)
    if num < 2 or not bool(torch.isfinite(samples).all()):
        return None
    start, stop = _straight_line(samples)
    step = (stop - start) / num
    expected = start + (torch.arange(num, dtype=torch.float64) + 0.5) * step - 0.5
    if step <= 0 or float((samples - expected).abs().max()) > STRAY * max(1.0, step):
        return None
    whole = _whole_pixels(samples, start, stop)
    start, stop = whole or (start, stop)
    return max(start, 0.0) / size, min(stop, float(size)) / size


def _straight_line(samples: Tensor) -> tuple[float, float]:
    """Least squares over the samples but for the ends, where filters repeat the border."""
    num = len(samples)
    ends = num // 4
    position = torch.arange(ends, num - ends, dtype=torch.float64) + 0.5
    inner = samples[ends : num - ends] + 0.5
    if len(position) < 2:
        position, inner = torch.arange(num, dtype=torch.float64) + 0.5, samples + 0.5
    centred = position - position.mean()
    step = float((centred * inner).sum() / (centred * centred).sum())
    start = float(inner.mean()) - step * float(position.mean())
    return start, start + step * num


def _whole_pixels(samples: Tensor, start: float, stop: float) -> tuple[int, int] | None:
    """The borders near to (start, stop) whose nearest neighbours are the samples themselves."""
    around = list(itertools.product((round(start) + i for i in (0, -1, 1)), (round(stop) + i for i in (0, -1, 1))))
    for first, last in sorted(around, key=lambda ends: abs(ends[0] - start) + abs(ends[1] - stop)):
        if last > first and torch.equal(_nearest(first, last, len(samples)), samples.float()):
            return first, last
    return None


def _nearest(first: int, last: int, num: int) -> Tensor:
    numbers = torch.arange(first, last, dtype=torch.float32)
    return F.interpolate(numbers[None, None], size=num, mode="nearest-exact")[0, 0]
