"""The pack's own sockets: a wrong wire cannot be connected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io
from torch import Tensor

if TYPE_CHECKING:
    from ..faces.identity import Identity as Person

Encoder = io.Custom("FUSEDID_ENCODER")
"""Carries `faces.encoder.FaceEncoder`."""
Identity = io.Custom("FUSEDID_IDENTITY")
"""Carries `faces.identity.Identity`."""
Routed = io.Custom("FUSEDID_ROUTED")
"""Carries `RoutedIdentities`."""
Recording = io.Custom("FUSEDID_RECORDING")
"""Carries `attention_recording.AttentionRecording`."""
Community = io.Custom("FUSEDID_COMMUNITY_OPTIONS")
"""Carries `community_options.CommunityOptions`."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where one person was said to be, before overlaps are resolved and borders feathered.

    mask: `[H, W]` in [0, 1]; None while a later node of the chain still has to find the place. painted: whether it came
    in as a MASK; places found in a content picture are found anew by every later node that has one.
    """

    mask: Tensor | None = None
    painted: bool = False


@dataclass(frozen=True, eq=False)
class RoutedIdentities:
    """Several people and where each one is.

    masks: resolved `[I, H, W]` in [0, 1], in the order of `identities`; None while somebody has no place yet (see
    `require_places`). background: `all` or `none` (METHOD 1.4). soft: whether borders are feathered. separation:
    self-attention separation, 0 is off. places: what the next node of the chain resolves again with its own settings.
    """

    identities: tuple[Person, ...]
    masks: Tensor | None
    background: str = "all"
    soft: bool = False
    separation: float = 0.0
    places: tuple[Place, ...] = ()


def person_label(identity: Person, number: int) -> str:
    """How messages call a person: `person 2 (Anna)`; numbers count from 1."""
    return f"person {number} ({identity.name})" if identity.name else f"person {number}"


def require_places(routed: RoutedIdentities) -> None:
    """Raises ValueError that names everybody without a place, unless the chain of routers is finished."""
    if routed.masks is not None:
        return
    numbered = zip(routed.identities, routed.places, strict=True)
    waiting = [person_label(one, number) for number, (one, place) in enumerate(numbered, 1) if place.mask is None]
    raise ValueError(
        f"the chain of MultiIDMaskRouter nodes ends before everybody has a place; waiting: {', '.join(waiting)}. "
        "Connect a mask to the router that adds the person, or 'content' and 'encoder' to the last router, which then "
        "finds everybody without a mask"
    )
