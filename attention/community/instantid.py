"""Tokens of InstantID (arXiv 2401.07519, `pipeline_stable_diffusion_xl_instantid.py`)."""

from __future__ import annotations

from torch import Tensor

from .modules import Weights
from .resampler import resample


def instantid_tokens(weights: Weights, embedding: Tensor) -> Tensor:
    """The raw face embedding `[R, 512]` as a sequence of one through the resampler -> `[R, 16, D_context]`.

    IP-Adapter's FaceID-Portrait unnorm is the same computation with other weights.
    """
    return resample(weights, embedding[:, None, :])
