"""The bars of issue 7: the largest ratios to an unpatched step, and what else must hold."""

from __future__ import annotations

from dataclasses import dataclass

PEER_BAR = 1.05
"""Against IPAdapter_plus FaceID's step."""
DENSE_BAR = 1.5
"""How much faster four routed people are than with a dense mask, at least."""
CACHE_MIB, CACHE_TOLERANCE = 44.1, 0.02
"""Keys and values of a 512 px reference in half precision, SD1.5."""


@dataclass(frozen=True)
class Bars:
    """Ratios for a family and device; None where no bar is named.

    full, half: one reference as large as the picture, of half its side. person: each further routed person.
    """

    full: float | None = None
    half: float | None = None
    person: float | None = None


BARS = {
    ("sd15", "cuda"): Bars(full=1.12, half=1.05, person=1.02),
    ("sd15", "cpu"): Bars(full=1.35, half=1.12, person=1.04),
    ("sdxl", "cuda"): Bars(half=1.06, person=1.02),  # its 512 px reference is half of 1024
}
