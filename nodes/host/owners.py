"""Whose a function or module is: names other packs in messages."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any


def owner_of(thing: Any) -> str:
    """`Pack-Folder (function)`, for things of the host or of a library `module (function)`."""
    while isinstance(thing, partial):
        thing = thing.func
    code = getattr(thing, "__func__", thing)
    if not (inspect.isfunction(code) or inspect.isclass(code)):
        code = type(code)
    name = code.__qualname__.replace(".<locals>", "")
    return f"{_pack(code)} ({name})"


def is_the_hosts(thing: Any) -> bool:
    """Whether a module's class or a function comes from ComfyUI or torch themselves."""
    module = getattr(thing, "__module__", None) or ""
    return module.partition(".")[0] in ("comfy", "torch", "builtins")


def _pack(code: Any) -> str:
    module = sys.modules.get(code.__module__)
    parts = Path(getattr(module, "__file__", None) or "").parts
    if "custom_nodes" in parts[:-1]:
        return Path(parts[parts.index("custom_nodes") + 1]).stem
    return Path(code.__module__).name if "/" in code.__module__ else code.__module__
