"""Who else is in the attention of a MODEL, for reports."""

from __future__ import annotations

from typing import Any

from .owners import owner_of

PATCHES = ("patch", "output_patch")


def neighbours(model: Any, attention: str) -> list[str]:
    """Names of other nodes' functions in `attn1` or `attn2`, as far as they are known before sampling."""
    options = model.model_options.get("transformer_options", {})
    listed = options.get("patches", {})
    found = [function for kind in PATCHES for function in listed.get(f"{attention}_{kind}", ())]
    found += options.get("patches_replace", {}).get(attention, {}).values()
    return list(dict.fromkeys(owner_of(function) for function in found))
