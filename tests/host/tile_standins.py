"""Stand-ins of our own for nodes that sample a picture in parts: what they do to the prompts they were given."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Region = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels of the picture that is cut."""


def cut_hints(
    prompt: Any, regions: Region | list[Region], picture_hw: tuple[int, int], tile_hw: tuple[int, int]
) -> Any:
    """Tiled upscalers: every ControlNet's hint is cut and resized; the hints of several tiles become a batch."""
    regions = regions if isinstance(regions, list) else [regions]
    return [[text, {**values, **_cut_control(values, regions, picture_hw, tile_hw)}] for text, values in prompt]


def _cut_control(values: dict[str, Any], regions: list[Region], picture_hw: Any, tile_hw: Any) -> dict[str, Any]:
    if values.get("control") is None:
        return {}
    links = []
    control = values["control"]
    while control is not None:
        copied = control.copy()
        hint = copied.cond_hint_original
        copied.cond_hint_original = torch.cat([_cut(hint, region, picture_hw, tile_hw) for region in regions])
        links.append(copied)
        control = control.previous_controlnet
    for link, behind in itertools.pairwise(links):
        link.set_previous_controlnet(behind)
    return {"control": links[0]}


def _cut(hint: Tensor, region: Region, picture_hw: tuple[int, int], tile_hw: tuple[int, int]) -> Tensor:
    down, across = hint.shape[-2] / picture_hw[0], hint.shape[-1] / picture_hw[1]
    top, left, bottom, right = region
    rows = slice(math.floor(top * down), math.ceil(bottom * down))
    columns = slice(math.floor(left * across), math.ceil(right * across))
    return functional.interpolate(hint[:, :, rows, columns], size=tile_hw, mode="nearest-exact")


def cut_masks(prompt: Any, region: Region) -> Any:
    """Detailers: every mask is cut; what else the prompt holds stays."""
    top, left, bottom, right = region
    return [
        [text, {name: v[:, top:bottom, left:right] if name == "mask" else v for name, v in values.items()}]
        for text, values in prompt
    ]


class CutsInside:
    """A model function wrapper that runs the latent in tiles, several at once, and gives each its part of the hints."""

    def __init__(self, tiles: list[Region]) -> None:
        self.tiles = tiles

    def __call__(self, apply: Any, given: dict[str, Any]) -> Tensor:
        x, t, c = given["input"], given["timestep"], dict(given["c"])
        found = torch.zeros_like(x)
        for top, left, bottom, right in self.tiles:  # in pixels of the latent
            control = given["control"]
            link = control
            while link is not None:
                size = [side * link.compression_ratio for side in x.shape[-2:]]
                whole = functional.interpolate(link.cond_hint_original, size=size, mode="nearest-exact")
                by = link.compression_ratio
                link.cond_hint = whole[:, :, top * by : bottom * by, left * by : right * by]
                link = link.previous_controlnet
            part = x[:, :, top:bottom, left:right]
            c["control"] = control.get_control(part, t, c, len(given["cond_or_uncond"]), c["transformer_options"])
            found[:, :, top:bottom, left:right] = apply(part, t, **c)
        return found
