"""Puts multi-identity cross-attention (METHOD 2.3) into a MODEL."""

from __future__ import annotations

from collections import Counter
from typing import Any

import comfy.patcher_extension

from ..attention.guidance_routing import GuidanceRouting
from ..attention.sites import discover_sites
from .guidance_slot import SPANS_KEY, TextSlot
from .guidance_spans import GuidanceSpans


def patch_guidance(model: Any, routing: GuidanceRouting | None) -> Any:
    """A clone of the MODEL that honours `GuidanceRouting` in a CONDITIONING; unpatched when there is none to honour.

    Layers whose replacement routes text by itself are left to it.
    """
    clone = model.clone()
    if routing is None or SPANS_KEY in clone.model_options["transformer_options"]:
        return clone
    options = clone.model_options["transformer_options"] = clone.model_options["transformer_options"].copy()
    spans = options[SPANS_KEY] = GuidanceSpans()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, SPANS_KEY, _noting(spans))
    replaced = options["patches_replace"] = options.get("patches_replace", {}).copy()
    layers = replaced["attn2"] = replaced.get("attn2", {}).copy()
    sites = discover_sites(clone.model.diffusion_model)
    depth = Counter(site.key[:2] for site in sites)
    for site in sites:
        block = site.key[:2]
        previous = layers.get(site.key, layers.get(block))
        if getattr(previous, "routes_text", False):
            continue
        slot = layers[site.key] = TextSlot(previous)
        if depth[block] == 1:  # packs for SD1.5 know the layer by this name and add to what they find there
            layers[block] = slot
    return clone


def _noting(spans: GuidanceSpans) -> Any:
    def calc_cond_batch(executor: Any, model: Any, conds: Any, x: Any, *rest: Any, **named: Any) -> Any:
        spans.note(conds, (x.shape[-2], x.shape[-1]))
        return executor(model, conds, x, *rest, **named)

    return calc_cond_batch
