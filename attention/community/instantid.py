"""Tokens of InstantID (arXiv 2401.07519, `pipeline_stable_diffusion_xl_instantid.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .modules import Weights
from .resampler import resample


def instantid_tokens(weights: Weights, embedding: Tensor) -> Tensor:
    """The raw face embedding `[R, 512]` as a sequence of one through the resampler -> `[R, 16, D_context]`.

    IP-Adapter's FaceID-Portrait unnorm is the same computation with other weights.
    """
    return resample(weights, embedding[:, None, :])


def averaged(embedding: Tensor, weights: Sequence[float] = ()) -> Tensor:
    """The mean of raw embeddings `[R, 512]` by their weights -> `[1, 512]`: what ComfyUI_InstantID makes of several
    pictures (there without weights). It is shorter than each of them, as the pictures differ."""
    shares = torch.tensor(list(weights) or [1.0] * len(embedding)).to(embedding)
    return (shares[:, None] * embedding).sum(0, keepdim=True) / shares.sum()
