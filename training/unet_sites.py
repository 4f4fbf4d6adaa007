"""The cross-attention sites of a diffusers UNet under their LDM names, with the resolution level of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from diffusers.models.attention import BasicTransformerBlock

from attention.grid import grid_at_level
from attention.sites import Site, diffusers_to_ldm, patch_key

UNet: TypeAlias = Any
"""diffusers' `UNet2DConditionModel`; its mixins hide its type from checkers."""

_PLACE = re.compile(r"^(down|up|mid)_blocks?\.?(\d+)?\.")
_SECTIONS = ("input", "middle", "output")


@dataclass(frozen=True, eq=False)
class UNetSite:
    """One transformer block: its LDM site and its diffusers path."""

    site: Site
    name: str

    @property
    def path(self) -> str:
        """LDM path, the site's name in files and reports."""
        return self.site.path

    def grid(self, latent_hw: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of this site for a latent of size `latent_hw`."""
        return grid_at_level(latent_hw, self.site.level)


def unet_sites(unet: UNet) -> tuple[UNetSite, ...]:
    """All cross-attention sites in LDM order.

    Raises ValueError for UNets whose blocks do not all have the same number of layers: LDM has no names for them.
    """
    layers, levels = layers_per_block(unet), len(unet.config["block_out_channels"])
    found = [
        UNetSite(_site(block, diffusers_to_ldm(name, layers), _level(name, levels)), name)
        for name, block in unet.named_modules()
        if isinstance(block, BasicTransformerBlock) and block.attn2 is not None
    ]
    if not found:
        raise ValueError("this UNet has no cross-attention, so there is nowhere to put a face; use SD1.5 or SDXL")
    return tuple(sorted(found, key=lambda entry: _order(entry.path)))


def layers_per_block(unet: UNet) -> int:
    """Layers of every block. Raises ValueError when they differ."""
    layers = unet.config["layers_per_block"]
    kinds = {layers} if isinstance(layers, int) else set(layers)
    if len(kinds) != 1:
        raise ValueError(
            f"the base UNet has {list(layers)} layers per block; FusedID knows UNets with the same number in every "
            "block (SD1.5, SD2, SDXL)"
        )
    return kinds.pop()


def _site(block: BasicTransformerBlock, path: str, level: int) -> Site:
    channels, context = block.attn2.to_k.weight.shape
    return Site(path, channels, block.attn2.heads, context, level)


def _level(name: str, levels: int) -> int:
    match = _PLACE.match(name)
    assert match is not None
    section, number = match.groups()
    if section == "mid":
        return levels - 1
    return int(number) if section == "down" else levels - 1 - int(number)


def _order(path: str) -> tuple[int, int, int]:
    section, number, index = patch_key(path)
    return _SECTIONS.index(section), number, index
