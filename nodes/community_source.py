"""Identities through a community adapter: tokens of a person, keys and values for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..attention.cache import ReferenceFeatures
from ..attention.community.families import CommunityFamily
from ..attention.community.layers import check_fits
from ..attention.community.source import CommunityAdapter, FaceTokens, face_tokens, token_features
from ..attention.sites import Site
from ..faces.identity import Identity, Reference
from .community_files import load_eva
from .community_inputs import encoder_note, face_inputs, used_references
from .community_lora import with_adapter_lora

__all__ = ["CommunityFeatures", "community_features", "identity_tokens", "with_adapter_lora"]


@dataclass(frozen=True, eq=False)
class CommunityFeatures:
    """What one identity contributes.

    positive: keys and values per set of tokens, for the positive prompt's rows. weights, pictures: of each set, and how
    many references are in it. negative: of "no face", for the negative prompt's rows; the families were trained with it
    there. note: a line for the report.
    """

    positive: tuple[ReferenceFeatures, ...]
    weights: tuple[float, ...]
    negative: ReferenceFeatures
    note: str = ""
    pictures: tuple[int, ...] = ()


def community_features(
    adapter: CommunityAdapter,
    sites: Sequence[Site],
    identity: Identity,
    *,
    clip_vision: Any | None = None,
    structure: float = 1.0,
    zero_tokens: int = 0,
) -> CommunityFeatures:
    """Keys and values of all references of one identity at every site, float32 on the CPU.

    zero_tokens: see `attention.community.pulid_methods`. Raises ValueError when the file does not fit the model, or a
    CLIP vision model or face pack is missing or wrong.
    """
    recognised = adapter.recognised
    check_fits(recognised.layers, sites, name=adapter.name)
    tokens, references = identity_tokens(
        adapter, identity, clip_vision=clip_vision, structure=structure, zero_tokens=zero_tokens
    )
    positive = tuple(token_features(adapter, sites, one, tokens.log_weight) for one in tokens.positive)
    notes = [encoder_note(recognised, identity)]
    if recognised.family.together:
        notes.append(_together_note(recognised.family, references))
        weights, pictures = (1.0,) if _weighing(references) else (0.0,), (len(references),)
    else:
        weights, pictures = tuple(reference.weight for reference in references), (1,) * len(references)
    return CommunityFeatures(
        positive=positive,
        weights=weights,
        negative=token_features(adapter, sites, tokens.negative[0]),
        note="; ".join(note for note in notes if note),
        pictures=pictures,
    )


def identity_tokens(
    adapter: CommunityAdapter,
    identity: Identity,
    *,
    clip_vision: Any | None = None,
    structure: float = 1.0,
    zero_tokens: int = 0,
) -> tuple[FaceTokens, tuple[Reference, ...]]:
    """Tokens of one identity, and the references they come from. Raises ValueError as `community_features`.

    Families that take all references together see those with a weight above 0, the weightiest and best found first.
    """
    recognised = adapter.recognised
    if recognised.family.together:
        references = _weighing(used_references(recognised, identity)) or identity.references
        identity = replace(identity, references=tuple(sorted(references, key=lambda r: (-r.weight, -r.score))))
    references = used_references(recognised, identity)
    eva = load_eva() if recognised.family.clip == "eva" else None
    weights = [reference.weight for reference in _weighing(references)]
    tokens = face_tokens(
        adapter,
        face_inputs(recognised, identity, clip_vision=clip_vision, eva=eva),
        structure=structure,
        weights=weights if len(weights) == len(references) else (),
        zero_tokens=zero_tokens,
    )
    return tokens, references


def _weighing(references: Sequence[Reference]) -> tuple[Reference, ...]:
    return tuple(reference for reference in references if reference.weight > 0)


def _together_note(family: CommunityFamily, references: Sequence[Reference]) -> str:
    """How several references became one set of tokens; empty for one."""
    if len(references) < 2:
        return ""
    note = f"{family.label}: {len(references)} references {family.together}"
    if len({reference.weight for reference in references}) == 1:
        return note
    return f"{note}, by their weights (the original knows no weights)"
