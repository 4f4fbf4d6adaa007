"""What a patched MODEL computes with: fixed when the node runs, shared by all clones of the MODEL."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..attention.cache import LayerFeatures, ReferenceFeatures
from ..attention.fusion import FaceControls, reference_weights
from ..attention.grid import grid_at_level
from ..attention.merge import num_left
from ..attention.prefetch import Prefetch
from ..attention.routing import Region
from ..attention.sites import Site
from ..attention.storage import AS_COMPUTED, Storage, StoredFeatures, layer_bytes
from .face_sources import FaceSource
from .reference import ReferenceLatent, ReferenceText
from .wire_types import RoutedIdentities

_numbers = itertools.count()
FLOAT32 = 4  # bytes per number

Features = ReferenceFeatures | StoredFeatures


@dataclass(frozen=True, eq=False)
class ReferencePass:
    """Faces that go through the model's own UNet. matched: noised to the picture's noise level, anew at every step.

    positive_text: the pass reads the picture's positive prompt instead of `text`. share: of the tokens, left after
    merging. storage: how clean references are kept.
    """

    source: FaceSource
    latents: tuple[ReferenceLatent, ...]
    text: ReferenceText
    matched: bool = False
    positive_text: bool = False
    share: float = 1.0
    storage: Storage = AS_COMPUTED


@dataclass(frozen=True, eq=False)
class GivenFaces:
    """Faces whose keys and values are known beforehand (community adapters). negative: of "no face"."""

    features: tuple[ReferenceFeatures, ...]
    negative: ReferenceFeatures | None = None


@dataclass(frozen=True)
class Shown:
    """One reference: whose it is, and its weight, of mean 1 among that person's.

    pictures: how many stand behind it, where a community family makes one set of tokens of several.
    """

    identity: int
    weight: float
    pictures: int = 1


def shown_references(references: Sequence[tuple[int, float, int]]) -> tuple[Shown, ...]:
    """(identity, weight > 0 as it was given, pictures) of every reference, the weights in proportion."""
    weights: dict[int, list[float]] = {}
    for identity, weight, _ in references:
        weights.setdefault(identity, []).append(weight)
    scaled = {identity: iter(reference_weights(given)) for identity, given in weights.items()}
    return tuple(Shown(identity, next(scaled[identity]), pictures) for identity, _, pictures in references)


@dataclass(frozen=True, eq=False)
class FusionPlan:
    """One run of the node.

    attention: `attn2` (cross-attention) or `attn1` (self-attention, training-free). active: paths of the sites that see
    the faces. both: whether the negative prompt's rows see them too. adain: whether queries and keys take on the
    reference's statistics. orthogonal: PuLID's projection of the branch, where `combine` is `decoupled`. names: of the
    people, in the order of their identities. start, end: fractions of the sampling run between which they act. number:
    names the plan in recordings. regions: found so far, by grid and place.
    """

    faces: ReferencePass | GivenFaces
    shown: tuple[Shown, ...]
    sites: tuple[Site, ...]
    active: frozenset[str]
    controls: FaceControls
    combine: str
    length: str
    start: float = 0.0
    end: float = 1.0
    attention: str = "attn2"
    both: bool = False
    adain: bool = False
    orthogonal: str = "off"
    routed: RoutedIdentities | None = None
    names: tuple[str, ...] = ()
    number: int = field(default_factory=lambda: next(_numbers))
    regions: dict[Any, tuple[Region, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FaceSet:
    """Every reference's features with one text. ahead: in place of them, where the layers take another form."""

    features: tuple[ReferenceFeatures, ...]
    ahead: Prefetch | None = None

    def at(self, path: str) -> tuple[LayerFeatures, ...]:
        """Every reference's features at one site."""
        return tuple(one.layers[path] for one in self.features) if self.ahead is None else self.ahead.layers(path)


def features_bytes(plan: FusionPlan, itemsize: int) -> int:
    """Memory of all references as they are kept; the model computes in `itemsize` bytes per number."""
    if isinstance(plan.faces, GivenFaces):
        tensors = (t for one in set(plan.faces.features) for f in one.layers.values() for t in (f.key, f.value))
        return itemsize * sum(t.numel() for t in tensors)
    return sum(_site_bytes(plan, plan.faces, site, itemsize) for site in plan.sites)


def device_bytes(plan: FusionPlan, itemsize: int, device_type: str) -> int:
    """What of it is on the model's device while sampling: of features kept in RAM two layers at a time."""
    faces = plan.faces
    if isinstance(faces, GivenFaces) or faces.storage.place == "model" or device_type == "cpu":
        return features_bytes(plan, itemsize)
    return sum(sorted(_site_bytes(plan, faces, site, itemsize) for site in plan.sites)[-2:])


def share_left(plan: FusionPlan) -> float:
    """The part of all references' tokens that merging leaves; grids that are small already are left whole."""
    if not isinstance(plan.faces, ReferencePass):
        return 1.0
    tokens = [count for site in plan.sites for count in _num_tokens(plan.faces, site)]
    return sum(num_left(count, plan.faces.share) for count in tokens) / sum(tokens)


def _num_tokens(faces: ReferencePass, site: Site) -> list[int]:
    """Of every reference at one site, before merging."""
    grids = [grid_at_level((one.latent.shape[-2], one.latent.shape[-1]), site.level) for one in faces.latents]
    return [rows * columns for rows, columns in grids]


def _site_bytes(plan: FusionPlan, faces: ReferencePass, site: Site, itemsize: int) -> int:
    """One site of all references."""
    total = 0
    for tokens in _num_tokens(faces, site):
        left = num_left(tokens, faces.share)
        total += layer_bytes(left, site.channels, itemsize, faces.storage)
        total += FLOAT32 * left if left < tokens else 0
        total += 4 * site.channels * itemsize if plan.attention == "attn1" else 0  # its statistics
    return total
