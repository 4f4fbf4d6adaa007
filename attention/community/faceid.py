"""Tokens of IP-Adapter FaceID, Portrait, Plus and PlusV2 (`ip_adapter/ip_adapter_faceid.py`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .modules import Weights, layer_norm, linear, split_tokens, under
from .resampler import resample


def faceid_tokens(weights: Weights, embedding: Tensor) -> Tensor:
    """`LayerNorm(Linear(GELU(Linear(e))))`: embeddings `[R, 512]` of unit length -> `[R, n, D_context]`.

    n is 4 for FaceID and 16 for Portrait.
    """
    tokens = linear(weights, "proj.2", F.gelu(linear(weights, "proj.0", embedding)))
    return layer_norm(weights, "norm", split_tokens(tokens, weights["norm.weight"].shape[0]))


def faceid_plus_tokens(
    weights: Weights, embedding: Tensor, clip_hidden: Tensor, *, shortcut: bool, structure: float = 1.0
) -> Tensor:
    """FaceID tokens that then look at the CLIP features of the aligned face: `[R, 4, D_context]`.

    shortcut: PlusV2 adds the result to the FaceID tokens; structure: its weight there (how much the CLIP picture, that
    is hair, light and pose, counts beside the embedding). Plus (first version) has neither.
    """
    start = faceid_tokens(weights, embedding)
    seen = resample(under(weights, "perceiver_resampler."), clip_hidden, start)
    return start + structure * seen if shortcut else seen
