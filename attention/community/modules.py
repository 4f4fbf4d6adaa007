"""The few layers community image projections are made of, computed from a table of tensors without module classes.

All in float32 whatever the file stores: these run once per face, and half precision on the CPU is slow and coarse.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def under(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """`name.weight` [out, in] and, where present, `name.bias` [out] applied to `[..., in]`."""
    bias = weights.get(f"{name}.bias")
    return F.linear(x, weights[f"{name}.weight"].float(), None if bias is None else bias.float())


def layer_norm(weights: Weights, name: str, x: Tensor, epsilon: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis; every image projection was trained with epsilon 1e-5."""
    weight, bias = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def split_tokens(x: Tensor, width: int) -> Tensor:
    """`[R, n * width]` -> `[R, n, width]`."""
    return x.reshape(x.shape[0], -1, width)
