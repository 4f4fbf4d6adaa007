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


@dataclass(frozen=True, eq=False)
class RoutedIdentities:
    """Several people and where each one is.

    masks: resolved `[I, H, W]` in [0, 1], in the order of `identities`. background: `all` or `none` (METHOD 1.4).
    soft: whether borders are feathered. separation: self-attention separation, 0 is off.
    """

    identities: tuple[Person, ...]
    masks: Tensor
    background: str = "all"
    soft: bool = False
    separation: float = 0.0
