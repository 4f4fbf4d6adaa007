"""Self-attention separation in a MODEL: people look less at each other in the coarse layers (PEERS finding 12)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..attention.separation import check_amount, memberships, separated_attention
from ..attention.sites import discover_sites, layer_groups

log = logging.getLogger("fusedid")

Replace = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def patch_separation(model: Any, masks_IHW: Tensor, amount: float) -> Any:
    """A clone of the MODEL whose coarse self-attention holds people apart; an unpatched clone when `amount` is 0.

    Receives: resolved masks `[I, H, W]`; amount in [0, 20], the score a token of another person loses. Another pack's
    replacement of the same layer stays in force: what separation changes is added to it. Applying it twice replaces.
    """
    check_amount(amount)
    clone = model.clone()
    if amount == 0.0:
        return clone
    sites = discover_sites(clone.model.diffusion_model)
    coarse = layer_groups(sites)["coarse"]
    replaced = clone.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    for site in sites:
        if site.path in coarse:
            previous = replaced.get(site.key, replaced.get(site.key[:2]))
            previous = getattr(previous, "fusedid_previous", previous)
            clone.set_model_attn1_replace(_separating(masks_IHW, amount, previous), *site.key)
    return clone


def _separating(masks_IHW: Tensor, amount: float, previous: Replace | None) -> Replace:
    members: dict[tuple[int, int, Any], Tensor] = {}

    def separated(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        def plain(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            return optimized_attention(q, k, v, heads, transformer_options=options)

        heads = options["n_heads"]
        h, w = options["activations_shape"][-2:]
        if q.shape[1] != h * w or k.shape[1] < q.shape[1]:
            _say_once("self-attention separation is off in layers whose tokens another node merges or splits")
            return previous(q, k, v, options) if previous else plain(q, k, v, heads)
        if (h, w, q.device) not in members:
            members[h, w, q.device] = memberships(masks_IHW, (h, w)).to(q.device)
        out = separated_attention(q, k, v, members[h, w, q.device], amount, heads=heads, attend=plain)
        return out if previous is None else previous(q, k, v, options) + (out - plain(q, k, v, heads))

    separated.fusedid_previous = previous  # type: ignore[attr-defined]
    return separated


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning(text)
