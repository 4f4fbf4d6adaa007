"""Mixing several people into one (METHOD 2.2) and telling how much of each is in the mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .embedding import cosine, normalised_weights
from .identity import EncoderFingerprint, Identity, Reference, mixed_embedding


@dataclass(frozen=True, eq=False)
class Mix:
    """A mixed identity and what went into it."""

    identity: Identity
    shares: tuple[float, ...]
    """Each parent's weight, normalised to sum 1."""
    cosines: tuple[float, ...]
    """Cosine of the mix to each parent, in [-1, 1]."""


def require_encoder(identity: Identity, encoder: EncoderFingerprint) -> None:
    """``ValueError`` naming both encoders unless the identity's embeddings mean the same as those of ``encoder``."""
    if not encoder.accepts(identity.encoder):
        raise ValueError(
            f"the identity {identity.name or '(unnamed)'} was made with the face encoder {identity.encoder}, but "
            f"{encoder} is in use here; their embeddings cannot be compared. Load the encoder "
            f"{identity.encoder.name!r}, or embed the person's photos again with {encoder.name!r}"
        )


def mix_identities(identities: Sequence[Identity], weights: Sequence[float], *, name: str = "") -> Mix:
    """One identity out of several: all their references, each person's weight spread over that person's references.

    The mixed embedding of the result is the weighted mean of the parents' unit embeddings, scaled back to the encoder's
    norm. Within a person the references keep their proportions. People of weight 0 are left out.
    Raises ``ValueError`` for no identity, different encoders, bad weights, or parents that cancel out.
    """
    if not identities:
        raise ValueError("got no identity to mix; connect at least one")
    encoder = identities[0].encoder
    for identity in identities[1:]:
        require_encoder(identity, encoder)
    shares = normalised_weights(weights, len(identities))
    parents = [mixed_embedding(identity) for identity in identities]
    references = tuple(
        reference
        for identity, share, parent in zip(identities, shares, parents)
        for reference in _scaled(identity, float(share), parent)
    )
    mix = Identity(references, encoder, name)
    mixed = mixed_embedding(mix)
    return Mix(mix, tuple(float(share) for share in shares), tuple(cosine(mixed, parent) for parent in parents))


def mix_report(mix: Mix, names: Sequence[str]) -> str:
    """One line per parent: its share and the cosine of the mix to it."""
    lines = [
        f"{name or f'identity {number}'}: {share:.0%} of the mix, cosine {value:.3f}"
        for number, (name, share, value) in enumerate(zip(names, mix.shares, mix.cosines), start=1)
    ]
    return "\n".join([*lines, f"encoder {mix.identity.encoder}"])


def _scaled(identity: Identity, share: float, parent: np.ndarray) -> list[Reference]:
    """The references with weights such that, summed as unit vectors, they give ``share`` of the unit parent."""
    if share == 0:
        return []
    total = sum(reference.weight for reference in identity.references)
    spread = _directness(identity, parent)
    return [replace(reference, weight=share * reference.weight / (total * spread)) for reference in identity.references]


def _directness(identity: Identity, parent: np.ndarray) -> float:
    """How much a person's references agree: the length of their weighted mean unit vector, in (0, 1].

    Without it a person whose photos differ among themselves would lose share to one with a single photo.
    """
    total = sum(reference.weight for reference in identity.references)
    agreements = [
        reference.weight / total * cosine(reference.embedding, parent)
        for reference in identity.references
        if reference.embedding is not None
    ]
    return float(sum(agreements))
