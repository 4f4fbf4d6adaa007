"""An adapter's tensor names in LDM (ComfyUI, what the node reads) and in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from attention.adapter import KEY_SUFFIX, VALUE_SUFFIX
from attention.sites import diffusers_to_ldm, ldm_to_diffusers

NAMINGS = ("ldm", "diffusers")
_PAIRS = (
    (KEY_SUFFIX, ".attn2.processor.to_k_face.weight"),
    (VALUE_SUFFIX, ".attn2.processor.to_v_face.weight"),
)


def to_diffusers(tensors: Mapping[str, Tensor], layers_per_block: int = 2) -> dict[str, Tensor]:
    """LDM names -> diffusers names; other tensors keep theirs."""
    return {_renamed(name, 0, lambda site: ldm_to_diffusers(site, layers_per_block)): t for name, t in tensors.items()}


def to_ldm(tensors: Mapping[str, Tensor], layers_per_block: int = 2) -> dict[str, Tensor]:
    """diffusers names -> LDM names, the inverse of `to_diffusers`."""
    return {_renamed(name, 1, lambda site: diffusers_to_ldm(site, layers_per_block)): t for name, t in tensors.items()}


def naming_of(names: Mapping[str, object]) -> str:
    """Which scheme a file's tensors are named by. Raises ValueError when it is neither."""
    for place, naming in enumerate(NAMINGS):
        if any(name.endswith(pair[place]) for name in names for pair in _PAIRS):
            return naming
    raise ValueError("the file holds no face projections (no ...to_k_face.weight); it is no fusion adapter")


def _renamed(name: str, source: int, convert: Callable[[str], str]) -> str:
    for pair in _PAIRS:
        if name.endswith(pair[source]):
            return convert(name.removesuffix(pair[source])) + pair[1 - source]
    return name
