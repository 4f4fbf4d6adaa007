"""From identities, style and text to ComfyUI's CONDITIONING (METHOD 2.1, 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention.guidance import Guidance, hybrid_guidance
from ..attention.guidance_routing import GuidanceBackground, GuidanceRouting, guidance_context
from ..attention.guidance_settings import GuidanceSettings, check_face_encoder
from ..faces.identity import Identity, mixed_embedding
from .wire_types import person_label

ROUTING_KEY = "fusedid_guidance"
"""Where a CONDITIONING entry carries its `GuidanceRouting`; the patched MODEL reads it there."""
POOLED_WIDTH = 1280
"""SDXL asks for a pooled text. Guidance has none, so it is zero: SDXL's own "no prompt", and what training feeds."""

Conditioning = list[list[Any]]


def face_embeddings(settings: GuidanceSettings, identities: Sequence[Identity], *, name: str) -> Tensor:
    """Raw mixed embeddings `[I, D]`; without an identity one zero row, the paper's picture without a human.

    Raises ValueError when an identity was embedded with another encoder than the guidance file's.
    """
    if not identities:
        return torch.zeros(1, settings.face_width)
    for identity in identities:
        encoder = identity.encoder
        check_face_encoder(
            settings,
            width=encoder.dim,
            recogniser_sha256=encoder.recogniser_sha256,
            encoder_name=encoder.name,
            name=name,
        )
    return torch.from_numpy(np.stack([mixed_embedding(identity) for identity in identities]))


def guidance_tokens(
    guidance: Guidance, faces_ID: Tensor, *, style: Tensor | None, text: Tensor | None, alpha: float
) -> Tensor:
    """e_g of every identity `[I, T, C]`, fp32 on the CPU."""
    with torch.no_grad():
        return hybrid_guidance(guidance, face_BD=faces_ID, style_BS=style, text_BS=text, alpha=alpha)


def positive(tokens_ITC: Tensor, routing: GuidanceRouting | None) -> Conditioning:
    """One entry: one identity's tokens, or all groups with the routing that says which region sees which."""
    if routing is None:
        return _entry(tokens_ITC[:1], {})
    return _entry(guidance_context(tokens_ITC, routing.background), {ROUTING_KEY: routing})


def negative(guidance: Guidance, num_keys: int) -> Conditioning:
    """The unconditional side, repeated to the positive's length: equal keys are one key, and rows batch together."""
    with torch.no_grad():
        null = guidance.null()
    return _entry(null.repeat(1, num_keys // null.shape[1], 1), {})


def _entry(context_1KC: Tensor, extra: dict[str, Any]) -> Conditioning:
    return [[context_1KC, {"pooled_output": torch.zeros(1, POOLED_WIDTH), **extra}]]


def routing_for(
    masks_IHW: Tensor, identities: Sequence[Identity], *, num_tokens: int, background: GuidanceBackground, seed: int
) -> GuidanceRouting:
    """Raises ValueError unless there is exactly one mask per identity and every mask covers something."""
    if len(masks_IHW) != len(identities):
        raise ValueError(
            f"the router has {len(masks_IHW)} masks for {len(identities)} identities. Connect one mask per identity"
        )
    for number, (mask, identity) in enumerate(zip(masks_IHW, identities), start=1):
        if not bool((mask > 0).any()):
            raise ValueError(
                f"the mask of {person_label(identity, number)} is empty, so no pixel would listen to that person. "
                "Paint it, or make room where another person's mask covers it"
            )
    return GuidanceRouting(masks_IHW, num_tokens, background, seed)
