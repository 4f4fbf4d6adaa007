"""The perceiver resampler that IP-Adapter Plus, FaceID-Plus, InstantID and PuLID v1.1 share.

Latents attend to features and to themselves: `latents += Attention(latents, [features; latents])`, then
`latents += FeedForward(latents)`, per layer. Heads are 64 wide in every published file.
Source: IP-Adapter, `ip_adapter/resampler.py` (after Flamingo, arXiv 2204.14198).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .modules import Weights, layer_norm, linear, under

HEAD_WIDTH = 64


def num_layers(weights: Weights) -> int:
    """How many layers the tensors `layers.<number>.*` make."""
    return len({name.split(".")[1] for name in weights if name.startswith("layers.")})


def attend(weights: Weights, features: Tensor, latents: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """One cross-attention (`layers.<n>.0.*`): features `[R, n, D]`, latents `[R, m, D]` -> `[R, m, D]`.

    log_weight: `[n + m]`, added to the scores of each key, features first; None is zeros.
    """
    features, latents = layer_norm(weights, "norm1", features), layer_norm(weights, "norm2", latents)
    query = linear(weights, "to_q", latents)
    key, value = linear(weights, "to_kv", torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
    query, key, value = (rearrange(t, "r n (h d) -> r h n d", d=HEAD_WIDTH) for t in (query, key, value))
    bias = None if log_weight is None else log_weight.to(query).expand(query.shape[2], -1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return linear(weights, "to_out", rearrange(out, "r h n d -> r n (h d)"))


def feed_forward(weights: Weights, latents: Tensor) -> Tensor:
    """`layers.<n>.1.*`: norm, wider, GELU, back."""
    return linear(weights, "3", F.gelu(linear(weights, "1", layer_norm(weights, "0", latents))))


def run_layers(
    weights: Weights, features: Tensor, latents: Tensor, numbers: range, log_weight: Tensor | None = None
) -> Tensor:
    """The given layers, one after the other. log_weight: as in `attend`."""
    for number in numbers:
        latents = latents + attend(under(weights, f"layers.{number}.0."), features, latents, log_weight)
        latents = latents + feed_forward(under(weights, f"layers.{number}.1."), latents)
    return latents


def resample(weights: Weights, features: Tensor, latents: Tensor | None = None) -> Tensor:
    """Tokens `[R, n, D_out]` from features `[R, m, D_in]`.

    `latents`: where the queries start; None takes the learned ones of the file (`latents` [1, n, D]).
    """
    start = weights["latents"].float().expand(features.shape[0], -1, -1) if latents is None else latents
    out = run_layers(weights, linear(weights, "proj_in", features), start, range(num_layers(weights)))
    return layer_norm(weights, "norm_out", linear(weights, "proj_out", out))
