"""What a patched MODEL computes with: fixed when the node runs, shared by all clones of the MODEL."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from ..attention.cache import ReferenceFeatures
from ..attention.fusion import FaceControls
from ..attention.grid import grid_at_level
from ..attention.routing import Region
from ..attention.schedule import Window
from ..attention.sites import Site
from .face_sources import FaceSource
from .reference import ReferenceLatent, ReferenceText
from .wire_types import RoutedIdentities

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class ReferencePass:
    """Faces that go through the model's own UNet. matched: noised to the picture's noise level, anew at every step.

    positive_text: the pass reads the picture's positive prompt instead of `text`.
    """

    source: FaceSource
    latents: tuple[ReferenceLatent, ...]
    text: ReferenceText
    matched: bool = False
    positive_text: bool = False


@dataclass(frozen=True, eq=False)
class GivenFaces:
    """Faces whose keys and values are known beforehand (community adapters). negative: of "no face"."""

    features: tuple[ReferenceFeatures, ...]
    negative: ReferenceFeatures | None = None


@dataclass(frozen=True)
class Shown:
    """One reference: whose it is, and its weight."""

    identity: int
    weight: float


@dataclass(frozen=True, eq=False)
class FusionPlan:
    """One run of the node.

    attention: `attn2` (cross-attention) or `attn1` (self-attention, training-free). active: paths of the sites that see
    the faces. both: whether the negative prompt's rows see them too. adain: whether queries and keys take on the
    reference's statistics. names: of the people, in the order of their identities. number: names the run in the options
    of a UNet call. kept, prompts: features, and prompts' fingerprints by the host's name, of the run in progress;
    emptied after sampling.
    """

    faces: ReferencePass | GivenFaces
    shown: tuple[Shown, ...]
    sites: tuple[Site, ...]
    active: frozenset[str]
    controls: FaceControls
    window: Window
    combine: str
    length: str
    attention: str = "attn2"
    both: bool = False
    adain: bool = False
    routed: RoutedIdentities | None = None
    names: tuple[str, ...] = ()
    number: int = field(default_factory=lambda: next(_numbers))
    kept: dict[Any, ReferenceFeatures] = field(default_factory=dict)
    prompts: dict[Any, str] = field(default_factory=dict)
    regions: dict[Any, tuple[Region, ...]] = field(default_factory=dict)

    def forget_run(self) -> None:
        """Lets go of what only the run in progress needed."""
        self.kept.clear()
        self.prompts.clear()


@dataclass(frozen=True, eq=False)
class Run:
    """One UNet call in which the faces act: features per reference, and of "no face" where the family has them."""

    features: tuple[ReferenceFeatures, ...]
    negative: ReferenceFeatures | None


def features_bytes(plan: FusionPlan, itemsize: int) -> int:
    """Memory of the keys and values of all references, with `itemsize` bytes per number."""
    if isinstance(plan.faces, GivenFaces):
        tensors = (t for one in set(plan.faces.features) for f in one.layers.values() for t in (f.key, f.value))
        return itemsize * sum(t.numel() for t in tensors)
    numbers = 0
    for one in plan.faces.latents:
        for site in plan.sites:
            rows, columns = grid_at_level((one.latent.shape[-2], one.latent.shape[-1]), site.level)
            numbers += rows * columns * site.channels
    return 2 * itemsize * numbers
