"""Self-attention separation in a MODEL: people look less at each other in the coarse layers (PEERS finding 12)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension as extension
import torch
from torch import Tensor

from ..attention.grid import crop_masks
from ..attention.separation import check_amount, memberships, separated_attention
from ..attention.sites import discover_sites, layer_groups
from .areas import Area, chunk_areas, note_areas

log = logging.getLogger("fusedid")

MOST_KEPT = 64
SEPARATION_KEY = "fusedid_separation"
"""Where a patched MODEL's transformer_options hold its `Separation`."""

Replace = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


class Separation:
    """What a MODEL separates: resolved masks `[I, H, W]` and the amount; remembers who owns which token."""

    def __init__(self, masks_IHW: Tensor, amount: float) -> None:
        self.amount = amount
        self._masks = masks_IHW
        self._members: dict[tuple[Any, ...], Tensor] = {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> Separation:
        return self

    def members(self, grid_hw: tuple[int, int], full_hw: tuple[int, int], area: Area | None, device: Any) -> Tensor:
        """`attention.separation.memberships` of one layer's tokens, for rows that show an area or the whole latent."""
        key = (grid_hw, area and full_hw, area, device)
        if key not in self._members:
            if len(self._members) >= MOST_KEPT:
                self._members.clear()
            masks = self._masks if area is None else crop_masks(self._masks, full_hw, area)
            self._members[key] = memberships(masks, grid_hw).to(device)
        return self._members[key]


def patch_separation(model: Any, masks_IHW: Tensor, amount: float) -> Any:
    """A clone of the MODEL whose coarse self-attention holds people apart; an unpatched clone when `amount` is 0.

    Receives: resolved masks `[I, H, W]`; amount in [0, 20], the score a token of another person loses. Another pack's
    replacement of the same layer stays in force: what separation changes is added to it. The layers read masks and
    amount from the MODEL, so that a second node only replaces them: nothing is ever separated twice.
    """
    check_amount(amount)
    clone = model.clone()
    if amount == 0.0:
        return clone
    options = clone.model_options["transformer_options"] = clone.model_options["transformer_options"].copy()
    present = SEPARATION_KEY in options
    options[SEPARATION_KEY] = Separation(masks_IHW, amount)
    if present:
        return clone
    clone.add_wrapper_with_key(extension.WrappersMP.CALC_COND_BATCH, SEPARATION_KEY, note_areas)
    sites = discover_sites(clone.model.diffusion_model)
    coarse = layer_groups(sites)["coarse"]
    replaced = options.get("patches_replace", {}).get("attn1", {})
    for site in sites:
        if site.path in coarse:
            clone.set_model_attn1_replace(_separating(replaced.get(site.key, replaced.get(site.key[:2]))), *site.key)
    return clone


def _separating(previous: Replace | None) -> Replace:
    def separated(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        def plain(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            return optimized_attention(q, k, v, heads, transformer_options=options)

        heads = options["n_heads"]
        h, w = options["activations_shape"][-2:]
        full_hw, areas = chunk_areas(options)
        if q.shape[1] != h * w or k.shape[1] < q.shape[1] or q.shape[0] % len(areas):
            _say_once("self-attention separation is off in layers whose tokens another node merges or splits")
            return previous(q, k, v, options) if previous else plain(q, k, v, heads)
        separation = options[SEPARATION_KEY]
        parts = []
        for rows, area in _rows(areas, q.shape[0]):
            member_IQ = separation.members((h, w), full_hw, area, q.device)
            parts.append(
                separated_attention(q[rows], k[rows], v[rows], member_IQ, separation.amount, heads=heads, attend=plain)
            )
        out = torch.cat(parts)
        return out if previous is None else previous(q, k, v, options) + (out - plain(q, k, v, heads))

    return separated


def _rows(areas: list[Area | None], num_rows: int) -> list[tuple[slice, Area | None]]:
    """The rows of every chunk with its area; one slice when all show the same."""
    if len(set(areas)) == 1:
        return [(slice(None), areas[0])]
    each = num_rows // len(areas)
    return [(slice(i * each, (i + 1) * each), area) for i, area in enumerate(areas)]


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning(text)
