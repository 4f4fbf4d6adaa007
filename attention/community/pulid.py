"""Tokens of PuLID for SDXL, v1 and v1.1 (arXiv 2404.16022, `pulid/encoders.py`, `pulid/encoders_transformer.py`).

Both read the raw face embedding beside the unit-length EVA-CLIP embedding, and five levels of EVA-CLIP's features.
PuLID's own "neutral" use of the attention part is the plain added branch; its orthogonal projections are not offered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .modules import Weights, layer_norm, linear, split_tokens
from .resampler import num_layers, run_layers

NEGATIVE_SLOPE = 0.01


def identity_condition(embedding: Tensor, eva_embed: Tensor) -> Tensor:
    """`[raw face embedding ; EVA embedding / its length]`: `[R, 512 + 768]`."""
    return torch.cat([embedding.float(), F.normalize(eva_embed.float(), dim=-1)], dim=-1)


def _mapped(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Linear, LayerNorm, LeakyReLU twice, then Linear."""
    for linear_at, norm_at in (("0", "1"), ("3", "4")):
        x = layer_norm(weights, f"{name}.{norm_at}", linear(weights, f"{name}.{linear_at}", x))
        x = F.leaky_relu(x, NEGATIVE_SLOPE)
    return linear(weights, f"{name}.6", x)


def pulid_v1_tokens(weights: Weights, condition: Tensor, levels: Sequence[Tensor], context: int) -> Tensor:
    """`[R, 1280]` and five `[R, n, 1024]` -> `[R, 5 + 5, D_context]`: one token per level after five of identity."""
    identity = split_tokens(_mapped(weights, "body", condition), context)
    seen = [
        _mapped(weights, f"mapping_{i}", level[:, :1])
        + _mapped(weights, f"mapping_patch_{i}", level[:, 1:]).mean(dim=1, keepdim=True)
        for i, level in enumerate(levels)
    ]
    return torch.cat([identity, *seen], dim=1)


def pulid_v11_tokens(weights: Weights, condition: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """`[R, 1280]` and five `[R, n, 1024]` -> `[R, 32, D_context]`: queries and identity tokens look at one level after
    the other; the queries are what is handed on."""
    queries = weights["latents"].float().expand(condition.shape[0], -1, -1)
    identity = split_tokens(_mapped(weights, "id_embedding_mapping", condition), queries.shape[-1])
    latents = torch.cat([queries, identity], dim=1)
    per_level = num_layers(weights) // len(levels)
    for i, level in enumerate(levels):
        features = torch.cat([identity, _mapped(weights, f"mapping_{i}", level)], dim=1)
        latents = run_layers(weights, features, latents, range(i * per_level, (i + 1) * per_level))
    return latents[:, : queries.shape[1]] @ weights["proj_out"].float()
