"""The ways PuLID's face branch is used: zero tokens beside the face's, and an orthogonal projection.

A zero token has a zero key and a zero value at every layer: what a pixel looks at there is nothing, so the more of
them, the weaker the face where it fits little. They stand beside "no face" in the negative rows as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from .orthogonal import OFF, V1, V2, V2_COMFYUI, require_orthogonal

MOST_ZERO_TOKENS = 80


@dataclass(frozen=True)
class PulidMethod:
    """zero_tokens: how many join each person's tokens. orthogonal: one of `orthogonal.ORTHOGONAL`."""

    name: str
    zero_tokens: int
    orthogonal: str

    @property
    def label(self) -> str:
        """For reports: `fidelity (8 zero tokens, orthogonal v1)`."""
        return f"{self.name} ({self.zero_tokens} zero tokens, orthogonal {self.orthogonal})"


FIDELITY = PulidMethod("fidelity", 8, V2_COMFYUI)
STYLE = PulidMethod("style", 16, V1)
NEUTRAL = PulidMethod("neutral", 0, OFF)
OFFICIAL = PulidMethod("official v1.1", 20, V2)
METHODS = {method.name: method for method in (FIDELITY, STYLE, NEUTRAL, OFFICIAL)}
"""fidelity, style, neutral: PuLID_ComfyUI's, its default first. official v1.1: where the official v1.1 demo starts."""
DEFAULT = FIDELITY


def choose_method(name: str, zero_tokens: int | None = None, orthogonal: str | None = None) -> PulidMethod:
    """A method by name, with its zero tokens and projection or those given instead.

    Raises ValueError for what is unknown or out of range.
    """
    if name not in METHODS:
        raise ValueError(f"unknown PuLID method {name!r}; known: {', '.join(METHODS)}")
    method = METHODS[name]
    zeros = method.zero_tokens if zero_tokens is None else zero_tokens
    projection = method.orthogonal if orthogonal is None else orthogonal
    require_orthogonal(projection)
    if not 0 <= zeros <= MOST_ZERO_TOKENS:
        raise ValueError(f"zero_tokens is {zeros}, accepted is 0 to {MOST_ZERO_TOKENS}")
    changed = (zeros, projection) != (method.zero_tokens, method.orthogonal)
    return PulidMethod(f"{name}, changed" if changed else name, zeros, projection)
