"""Tokens of IP-Adapter: standard, Plus, Plus Face, Full Face (arXiv 2308.06721, `ip_adapter/ip_adapter.py`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .modules import Weights, layer_norm, linear, split_tokens
from .resampler import resample


def standard_tokens(weights: Weights, clip_embeds: Tensor) -> Tensor:
    """`LayerNorm(Linear(e))`: projected CLIP embeddings `[R, D]` -> `[R, 4, D_context]`."""
    return layer_norm(
        weights, "norm", split_tokens(linear(weights, "proj", clip_embeds), weights["norm.weight"].shape[0])
    )


def plus_tokens(weights: Weights, clip_hidden: Tensor) -> Tensor:
    """Penultimate CLIP hidden states `[R, 257, D]` through the resampler -> `[R, 16, D_context]`."""
    return resample(weights, clip_hidden)


def full_face_tokens(weights: Weights, clip_hidden: Tensor) -> Tensor:
    """One token per CLIP position: `LayerNorm(Linear(GELU(Linear(h))))`, `[R, 257, D]` -> `[R, 257, D_context]`."""
    return layer_norm(weights, "proj.3", linear(weights, "proj.2", F.gelu(linear(weights, "proj.0", clip_hidden))))
