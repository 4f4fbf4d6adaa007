"""The cross-attention sites of SD-type UNets and their names in LDM (ComfyUI) and diffusers.

A site is one transformer block. Its LDM path (`input_blocks.1.1.transformer_blocks.0`) is its name everywhere: in the
adapter file, in reports, in error messages. Other ids are derived from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

_LDM = re.compile(r"^(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.(\d+))?\.transformer_blocks\.(\d+)$")
_DIFFUSERS = re.compile(r"^(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)$")
_SECTIONS = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}


@dataclass(frozen=True)
class Site:
    """One transformer block with cross-attention.

    path: LDM path below the UNet. channels: width of its hidden tokens. heads: attention heads.
    context: width of the text context its keys come from. level: downsamplings between the latent and this block.
    """

    path: str
    channels: int
    heads: int
    context: int
    level: int

    @property
    def key(self) -> tuple[str, int, int]:
        """ComfyUI's key in `patches_replace`: (section, block number, transformer index)."""
        return patch_key(self.path)


@dataclass(frozen=True)
class Family:
    """A kind of base model: what an adapter must fit. native_size: side in pixels of the pictures it was trained on."""

    name: str
    label: str
    num_sites: int
    context: int
    native_size: int


USUAL_SIZE = 512
FAMILIES = (
    Family("sd15", "Stable Diffusion 1.x", 16, 768, 512),
    Family("sd20", "Stable Diffusion 2.x", 16, 1024, 512),
    Family("sdxl", "Stable Diffusion XL", 70, 2048, 1024),
)


def patch_key(path: str) -> tuple[str, int, int]:
    """`input_blocks.1.1.transformer_blocks.0` -> ("input", 1, 0). The middle block is ("middle", 0, index).

    The host numbers the middle 0 although its path holds a 1: registering 1 loses the layer without an error.
    """
    match = _LDM.match(path)
    if match is None:
        raise ValueError(f"{path!r} is not the LDM path of a transformer block")
    section, number, _, index = match.groups()
    return _SECTIONS[section], 0 if section == "middle_block" else int(number), int(index)


def discover_sites(unet: nn.Module) -> tuple[Site, ...]:
    """All transformer blocks with a cross-attention `attn2`, in LDM order, found by walking an LDM-named UNet.

    Returns an empty tuple for models that are no such UNet (Flux, SD3, ...).
    """
    found = []
    levels = _levels(unet)
    for path, block in unet.named_modules():
        attn2 = getattr(block, "attn2", None)
        if _LDM.match(path) and attn2 is not None and attn2.to_k.weight.ndim == 2:
            channels, context = attn2.to_k.weight.shape
            found.append(Site(path, channels, attn2.heads, context, levels[patch_key(path)[:2]]))
    return tuple(sorted(found, key=lambda site: _order(site.path)))


def _levels(unet: nn.Module) -> dict[tuple[str, int], int]:
    """Resolution level of every block of an LDM UNet, from where its down- and upsampling modules sit."""
    levels: dict[tuple[str, int], int] = {}
    level = 0
    for number, block in enumerate(getattr(unet, "input_blocks", ())):
        level += _has(block, "Downsample")
        levels["input", number] = level
    levels["middle", 0] = level
    for number, block in enumerate(getattr(unet, "output_blocks", ())):
        levels["output", number] = level
        level -= _has(block, "Upsample")  # the last thing in its block: what follows is finer
    return levels


def _has(block: nn.Module, class_name: str) -> bool:
    return any(type(module).__name__ == class_name for module in block.modules())


def _order(path: str) -> tuple[int, int, int]:
    section, number, index = patch_key(path)
    return ("input", "middle", "output").index(section), number, index


def family_of(sites: Iterable[Site]) -> str:
    """Name of the family these sites belong to; `custom` when they fit none (pruned and miniature models)."""
    sites = tuple(sites)
    for family in FAMILIES:
        if len(sites) == family.num_sites and {site.context for site in sites} == {family.context}:
            return family.name
    return "custom"


def native_size(sites: Iterable[Site]) -> int:
    """Side in pixels of the pictures that a model of these sites was trained on.

    Pruned models (SSD-1B, Vega) have fewer layers than their family and its text encoder, by which they are told.
    """
    contexts = {site.context for site in sites}
    return next((family.native_size for family in FAMILIES if {family.context} == contexts), USUAL_SIZE)


def layer_groups(sites: Iterable[Site]) -> dict[str, frozenset[str]]:
    """Named groups of sites, for a user who wants the face in some layers only.

    `all`; by place `down`, `middle`, `up`; by resolution `coarse` (the widest, lowest-resolution layers: layout and
    head shape) and `fine` (the others: features and skin).
    """
    sites = tuple(sites)
    widest = max((site.channels for site in sites), default=0)
    return {
        "all": frozenset(site.path for site in sites),
        "down": frozenset(site.path for site in sites if site.key[0] == "input"),
        "middle": frozenset(site.path for site in sites if site.key[0] == "middle"),
        "up": frozenset(site.path for site in sites if site.key[0] == "output"),
        "coarse": frozenset(site.path for site in sites if site.channels == widest),
        "fine": frozenset(site.path for site in sites if site.channels < widest),
    }


LAYER_GROUPS = ("all", "down", "middle", "up", "coarse", "fine")


def ldm_to_diffusers(path: str, layers_per_block: int = 2) -> str:
    """LDM path -> diffusers path of the same transformer block, for UNets with equal layers per block."""
    section, number, index = patch_key(path)
    stride = layers_per_block + 1
    if section == "middle":
        place = "mid_block.attentions.0"
    elif section == "input":
        place = f"down_blocks.{(number - 1) // stride}.attentions.{(number - 1) % stride}"
    else:
        place = f"up_blocks.{number // stride}.attentions.{number % stride}"
    return f"{place}.transformer_blocks.{index}"


def diffusers_to_ldm(path: str, layers_per_block: int = 2) -> str:
    """diffusers path -> LDM path; the inverse of `ldm_to_diffusers`."""
    match = _DIFFUSERS.match(path)
    if match is None:
        raise ValueError(f"{path!r} is not the diffusers path of a transformer block")
    direction, block, middle, attention, index = match.groups()
    stride = layers_per_block + 1
    if middle:
        place = "middle_block.1"
    elif direction == "down":
        place = f"input_blocks.{1 + int(block) * stride + int(attention)}.1"
    else:
        place = f"output_blocks.{int(block) * stride + int(attention)}.1"
    return f"{place}.transformer_blocks.{index}"


def _table(rows: Iterable[tuple[str, int, int, int]], heads: Mapping[int, int], context: int) -> tuple[Site, ...]:
    return tuple(
        Site(f"{place}.transformer_blocks.{index}", channels, heads[channels], context, level)
        for place, channels, depth, level in rows
        for index in range(depth)
    )


SD15_SITES = _table(
    [
        ("input_blocks.1.1", 320, 1, 0),
        ("input_blocks.2.1", 320, 1, 0),
        ("input_blocks.4.1", 640, 1, 1),
        ("input_blocks.5.1", 640, 1, 1),
        ("input_blocks.7.1", 1280, 1, 2),
        ("input_blocks.8.1", 1280, 1, 2),
        ("middle_block.1", 1280, 1, 3),
        ("output_blocks.3.1", 1280, 1, 2),
        ("output_blocks.4.1", 1280, 1, 2),
        ("output_blocks.5.1", 1280, 1, 2),
        ("output_blocks.6.1", 640, 1, 1),
        ("output_blocks.7.1", 640, 1, 1),
        ("output_blocks.8.1", 640, 1, 1),
        ("output_blocks.9.1", 320, 1, 0),
        ("output_blocks.10.1", 320, 1, 0),
        ("output_blocks.11.1", 320, 1, 0),
    ],
    heads={320: 8, 640: 8, 1280: 8},
    context=768,
)

SDXL_SITES = _table(
    [
        ("input_blocks.4.1", 640, 2, 1),
        ("input_blocks.5.1", 640, 2, 1),
        ("input_blocks.7.1", 1280, 10, 2),
        ("input_blocks.8.1", 1280, 10, 2),
        ("middle_block.1", 1280, 10, 2),
        ("output_blocks.0.1", 1280, 10, 2),
        ("output_blocks.1.1", 1280, 10, 2),
        ("output_blocks.2.1", 1280, 10, 2),
        ("output_blocks.3.1", 640, 2, 1),
        ("output_blocks.4.1", 640, 2, 1),
        ("output_blocks.5.1", 640, 2, 1),
    ],
    heads={640: 10, 1280: 20},
    context=2048,
)
