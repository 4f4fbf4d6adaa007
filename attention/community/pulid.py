"""Tokens of PuLID for SDXL, v1 and v1.1 (arXiv 2404.16022, `pulid/encoders.py`, `pulid/encoders_transformer.py`).

Both read the raw face embedding beside the unit-length EVA-CLIP embedding, and five levels of EVA-CLIP's features.
All R references of a person give one set of tokens, as in the official `pipeline_v1_1.py` and `app.py`. The originals
know no weights of references. Here a weight w adds log w to the score of everything that comes from the reference: in
v1.1 wherever the encoder looks at it, in v1 (whose tokens stay apart) in the UNet's attention. So equal weights are the
original, weight 0 is the person without that reference, and nothing jumps between. What the tokens are for in the UNet:
`pulid_methods.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .modules import Weights, layer_norm, linear, split_tokens
from .orthogonal import LEADING
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


def relative_log_weights(weights: Sequence[float], counts: Sequence[int]) -> Tensor:
    """log(w_r / the largest), repeated `counts[r]` times: `[sum of counts]`."""
    shares = torch.tensor([weight / max(weights) for weight in weights], dtype=torch.float64)
    return shares.log().float().repeat_interleave(torch.tensor(counts))


def pulid_v1_tokens(weights: Weights, condition: Tensor, levels: Sequence[Tensor], context: int) -> Tensor:
    """`[R, 1280]` and five `[R, n, 1024]` -> `[R, 5 + 5, D_context]`: one token per level after five of identity."""
    identity = split_tokens(_mapped(weights, "body", condition), context)
    seen = [
        _mapped(weights, f"mapping_{i}", level[:, :1])
        + _mapped(weights, f"mapping_patch_{i}", level[:, 1:]).mean(dim=1, keepdim=True)
        for i, level in enumerate(levels)
    ]
    return torch.cat([identity, *seen], dim=1)


def joined_v1_tokens(tokens_RND: Tensor) -> Tensor:
    """Tokens of R references `[R, 10, D]` -> of the person `[1, 10 + 5 (R - 1), D]`: the first reference's all, of the
    others, `app.py`'s supplementary photos, the five of identity."""
    return torch.cat([tokens_RND[:1], tokens_RND[1:, :LEADING].reshape(1, -1, tokens_RND.shape[2])], dim=1)


def pulid_v11_tokens(
    weights: Weights, condition: Tensor, levels: Sequence[Tensor], reference_weights: Sequence[float] = ()
) -> Tensor:
    """`[B, 1280]` or, for R references of each person, `[B, R, 1280]`; five `[B, R n, 1024]` -> `[B, 32, D_context]`.

    Queries and all references' identity tokens look at one level after the other; the queries are what is handed on.
    reference_weights: of the R references; none is equal ones.
    """
    references = condition.shape[1] if condition.ndim == 3 else 1
    queries = weights["latents"].float().expand(condition.shape[0], -1, -1)
    mapped = _mapped(weights, "id_embedding_mapping", condition).flatten(1)
    identity = split_tokens(mapped, queries.shape[-1])
    latents = torch.cat([queries, identity], dim=1)
    per_level = num_layers(weights) // len(levels)
    for i, level in enumerate(levels):
        features = torch.cat([identity, _mapped(weights, f"mapping_{i}", level)], dim=1)
        log_weight = None
        if len(set(reference_weights)) > 1:
            counts = (identity.shape[1] // references, level.shape[1] // references)
            of_identity, of_level = (relative_log_weights(reference_weights, [n] * references) for n in counts)
            log_weight = torch.cat([of_identity, of_level, torch.zeros(queries.shape[1]), of_identity])
        latents = run_layers(weights, features, latents, range(i * per_level, (i + 1) * per_level), log_weight)
    return latents[:, : queries.shape[1]] @ weights["proj_out"].float()
