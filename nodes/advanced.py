"""Marks inputs that most users leave alone."""

from __future__ import annotations

from typing import Any


def advanced(entry: Any) -> Any:
    """The same input, folded by renderers that know the mark (Nodes 2.0); the classic canvas shows it as any other.

    Input classes take no such argument in the oldest supported ComfyUI, but all of them pass `extra_dict` on.
    """
    entry.extra_dict = {**(entry.extra_dict or {}), "advanced": True}
    return entry
