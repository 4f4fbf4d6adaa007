"""Identities through a community adapter: keys and values for every layer, and the adapter's LoRA part on the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sd

from ..attention.cache import ReferenceFeatures
from ..attention.community.layers import check_fits
from ..attention.community.source import CommunityAdapter, adapter_lora, face_tokens, token_features
from ..attention.sites import Site
from ..faces.identity import Identity
from .community_files import load_eva
from .community_inputs import encoder_note, face_inputs, used_references

log = logging.getLogger("fusedid")


@dataclass(frozen=True, eq=False)
class CommunityFeatures:
    """What one identity contributes.

    positive: keys and values per reference, for the positive prompt's rows. weights: of these references. negative: of
    "no face", for the negative prompt's rows; the families were trained with it there. note: a line for the report.
    """

    positive: tuple[ReferenceFeatures, ...]
    weights: tuple[float, ...]
    negative: ReferenceFeatures
    note: str = ""


def community_features(
    adapter: CommunityAdapter,
    sites: Sequence[Site],
    identity: Identity,
    *,
    clip_vision: Any | None = None,
    structure: float = 1.0,
) -> CommunityFeatures:
    """Keys and values of all references of one identity at every site, float32 on the CPU.

    Raises ValueError when the file does not fit the model, or a CLIP vision model or face pack is missing or wrong.
    """
    recognised = adapter.recognised
    check_fits(recognised.layers, sites, name=adapter.name)
    eva = load_eva() if recognised.family.clip == "eva" else None
    tokens = face_tokens(
        adapter, face_inputs(recognised, identity, clip_vision=clip_vision, eva=eva), structure=structure
    )
    references = used_references(recognised, identity)
    return CommunityFeatures(
        positive=tuple(token_features(adapter, sites, one) for one in tokens.positive),
        weights=tuple(reference.weight for reference in references),
        negative=token_features(adapter, sites, tokens.negative[0]),
        note=encoder_note(recognised, identity),
    )


def with_adapter_lora(model: Any, adapter: CommunityAdapter, sites: Sequence[Site], strength: float) -> Any:
    """A clone of the MODEL with the adapter's LoRA part, through the host's own LoRA path; the MODEL itself if none.

    Raises ValueError when the host did not take every tensor: half a LoRA would be a silent loss of likeness.
    """
    lora = adapter_lora(adapter, sites)
    if not lora or strength == 0:
        return model
    before = _num_patches(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
    added, wanted = _num_patches(patched) - before, len(lora) // 2
    if added != wanted:
        raise ValueError(
            f"{adapter.name}: the host took {added} of the {wanted} LoRA layers of the file, so it does not fit this "
            "model. Use an adapter made for this base model"
        )
    log.info("%s: %d LoRA layers at strength %g", adapter.name, wanted, strength)
    return patched


def _num_patches(model: Any) -> int:
    return sum(len(patches) for patches in model.patches.values())
