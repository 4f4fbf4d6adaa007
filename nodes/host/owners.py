"""Whose a function or module is: names other packs in messages."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import PurePath
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
    """The folder below custom_nodes, else the module. The host names packs' modules by their path."""
    file = getattr(sys.modules.get(code.__module__), "__file__", None)
    for name in (file, code.__module__):
        parts = PurePath((name or "").replace("\\", "/")).parts
        if "custom_nodes" in parts[:-1]:
            return parts[parts.index("custom_nodes") + 1].partition(".")[0]
    return PurePath(code.__module__).name
