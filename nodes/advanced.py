"""Marks inputs that most users leave alone."""

from __future__ import annotations

from typing import Any


def advanced(entry: Any) -> Any:
    """The same input, folded away by frontends that know `advanced`; older ones show it as before.

    Input classes take no such argument in the oldest supported ComfyUI, but all of them pass `extra_dict` on.
    """
    entry.extra_dict = {**(entry.extra_dict or {}), "advanced": True}
    return entry
