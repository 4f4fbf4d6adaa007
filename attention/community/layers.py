"""The numbered attention layers of community files, and which site each number is (IP-Adapter's processor order).

The numbers count diffusers' attention processors: attn1 and attn2 of every transformer block in turn, blocks in the
order down, up, middle. So attn2 of the i-th block has number 2i + 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..sites import SD15_SITES, SDXL_SITES, Site

_PROJECTION = re.compile(r"^ip_adapter\.(\d+)\.to_([kv])_ip\.weight$")
_LORA = re.compile(r"^ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_PLACES = ("input", "output", "middle")
PUBLISHED = {"sd15": SD15_SITES, "sdxl": SDXL_SITES}
LABELS = {"sd15": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL", "custom": "a UNet of another layout"}


@dataclass(frozen=True)
class LayerTable:
    """What a file's projections fit. base: `sd15`, `sdxl` or `custom`. widths: in the file's order. context: width."""

    base: str
    widths: tuple[int, ...]
    context: int

    @property
    def label(self) -> str:
        """For messages: `Stable Diffusion XL (70 layers)`."""
        return f"{LABELS[self.base]} ({len(self.widths)} layers)"


def processor_order(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Sites in the order of community files: down, up, middle."""
    return tuple(sorted(sites, key=lambda site: (_PLACES.index(site.key[0]), site.key[1:])))


def read_layer_table(shapes: Mapping[str, tuple[int, ...]], *, name: str) -> LayerTable:
    """Checks the numbering and shapes of all projections.

    Raises ValueError for even numbers (transformer models such as FLUX), gaps, one of key and value missing, or mixed
    context widths.
    """
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for tensor, shape in shapes.items():
        if match := _PROJECTION.match(tensor):
            found.setdefault(int(match[1]), {})[match[2]] = shape
    if not found:
        raise ValueError(f"{name} holds an image projection but no attention layers; half of it is missing")
    if any(number % 2 == 0 for number in found):
        raise ValueError(
            f"{name} is an IP-Adapter for a transformer model (FLUX, SD3 or similar); FusedID works on Stable "
            "Diffusion 1.x and XL. Use an adapter made for these"
        )
    return _checked_table(found, name)


def _checked_table(found: Mapping[int, Mapping[str, tuple[int, ...]]], name: str) -> LayerTable:
    missing = sorted(set(range(1, 2 * len(found), 2)) - set(found))
    if missing:
        raise ValueError(
            f"{name} lacks layer {missing[0]} of its attention layers; it is incomplete, download it again"
        )
    numbers = sorted(found)
    for number in numbers:
        pair = found[number]
        if set(pair) != {"k", "v"} or pair["k"] != pair["v"] or len(pair["k"]) != 2 or 0 in pair["k"]:
            raise ValueError(f"{name}: layer {number} lacks keys or values, or their shapes differ; download it again")
    contexts = {found[number]["k"][1] for number in numbers}
    if len(contexts) > 1:
        raise ValueError(f"{name} mixes layers for context widths {sorted(contexts)}; it is damaged, download it again")
    widths = tuple(found[number]["k"][0] for number in numbers)
    context = contexts.pop()
    return LayerTable(_base(widths, context), widths, context)


def _base(widths: tuple[int, ...], context: int) -> str:
    for base, sites in PUBLISHED.items():
        if context == sites[0].context and widths == tuple(site.channels for site in processor_order(sites)):
            return base
    return "custom"


def check_fits(table: LayerTable, sites: Sequence[Site], *, name: str) -> None:
    """Raises ValueError unless the file has exactly this model's layers; a part of them would be a partial patch."""
    model = processor_order(sites)
    widths, contexts = tuple(site.channels for site in model), {site.context for site in model}
    if widths == table.widths and contexts == {table.context}:
        return
    context = ", ".join(str(width) for width in sorted(contexts))
    reason = ""
    if contexts == {table.context} and len(widths) != len(table.widths):
        reason = f": it has {len(table.widths)} of the model's {len(widths)} layers and is incomplete"
        if len(table.widths) > len(widths):
            reason = f": it has {len(table.widths)} layers, the model has {len(widths)}"
    raise ValueError(
        f"{name} is for {table.label} with text width {table.context}, but the model has {len(widths)} cross-attention "
        f"layers with text width {context}{reason}. Use an adapter made for this base model"
    )


def projections(weights: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of each site -> (W_k, W_v), both `[C, D_context]`. The caller has checked that the file fits."""
    return {
        site.path: tuple(weights[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] for part in "kv")  # type: ignore[misc]
        for i, site in enumerate(processor_order(sites))
    }


def has_lora(shapes: Iterable[str]) -> bool:
    """Whether the file carries a LoRA for the UNet's own projections."""
    return any(_LORA.match(tensor) for tensor in shapes)


def lora_state_dict(weights: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """The LoRA part under names a LoRA loader knows: `diffusion_model.<path>.attn1.to_q.lora_down.weight`.

    FaceID files change all four projections of attn1 and attn2 in every block; without alpha, so the scale is 1.
    Raises ValueError when a number lies outside the model.
    """
    order = processor_order(sites)
    renamed: dict[str, Tensor] = {}
    for tensor, weight in weights.items():
        match = _LORA.match(tensor)
        if match is None:
            continue
        number, projection, side = int(match[1]), match[2], match[3]
        if number >= 2 * len(order):
            raise ValueError(
                f"the file's LoRA changes layer {number}, the model has {2 * len(order)}; wrong base model"
            )
        target = "to_out.0" if projection == "out" else f"to_{projection}"
        place = f"diffusion_model.{order[number // 2].path}.attn{1 + number % 2}.{target}"
        renamed[f"{place}.lora_{side}.weight"] = weight
    return renamed
