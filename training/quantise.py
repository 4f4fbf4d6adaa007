"""Weights as 8-bit integers with one scale per output channel: half the size of fp16, for files that travel.

Symmetric rounding: weight = int8 * scale, scale = max |row| / 127; the error is at most half a scale per weight.
Vectors (biases, norms) and small matrices stay fp16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".int8_scale"
LEAST = 4096
"""Smaller tensors are not worth a scale."""


def quantised(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every large matrix or kernel as int8 plus `<name>.int8_scale` fp32 `[out]`; the rest as fp16."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim < 2 or weight.numel() < LEAST:
            found[name] = weight.half().contiguous()
            continue
        rows = weight.float().flatten(1)
        scale = rows.abs().amax(1).clamp_min(1e-12) / 127
        found[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(weight.shape).contiguous()
        found[name + SCALE] = scale
    return found


def restored(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse, fp32."""
    found = {}
    for name, weight in weights.items():
        if name.endswith(SCALE):
            continue
        scale = weights.get(name + SCALE)
        found[name] = weight.float()
        if scale is not None:
            found[name] *= scale.reshape(-1, *[1] * (weight.ndim - 1))
    return found
