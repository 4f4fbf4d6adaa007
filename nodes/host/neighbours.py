"""Who is in the attention of a MODEL, for reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...attention.sites import Site
from .install import effects_of
from .owners import owner_of

PATCHES = ("patch", "output_patch")


def neighbours(model: Any, attention: str) -> list[str]:
    """Names of other nodes' functions in `attn1` or `attn2`, as far as they are known before sampling."""
    options = model.model_options.get("transformer_options", {})
    listed = options.get("patches", {})
    found = [function for kind in PATCHES for function in listed.get(f"{attention}_{kind}", ())]
    found += options.get("patches_replace", {}).get(attention, {}).values()
    return list(dict.fromkeys(owner_of(function) for function in found))


def layers_taken(model: Any, sites: Sequence[Site]) -> Counter[str]:
    """How many cross-attention layers other nodes replace, by name."""
    replaced = model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})
    found = (replaced.get(site.key, replaced.get(site.key[:2])) for site in sites)
    return Counter(owner_of(function) for function in found if function is not None)


def layers_of_ours(model: Any) -> list[tuple[str, str, int, int]]:
    """Of every kind of effect of ours: the node's name, `attn1` or `attn2`, in how many layers, and how many such."""
    found = Counter((one.label, one.attention, len(one.sites)) for one in effects_of(model) if one.sites)
    return [(*place, number) for place, number in found.items()]
