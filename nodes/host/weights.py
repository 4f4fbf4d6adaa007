"""A name for the weights that a model computes with at this moment: its patches, and the hooks in force.

The host's own name for them (`patches_uuid`) is new in every run that has hooks, and a Python id is given away again
once its object is gone. So patches are named by what they are: numbers by their value, tensors by a serial number that
is never given twice.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_numbers = itertools.count()
_serials = WeakIdKeyDictionary()
_names: weakref.WeakKeyDictionary[Any, tuple[Any, dict[Any, str]]] = weakref.WeakKeyDictionary()
"""Per patcher the names found so far, as long as its patches are these."""
_parts_of: dict[str, list[weakref.ref[Any]]] = {}
"""Per name the tensors and objects that it stands for."""


def weights_name(base: Any) -> str:
    """Of the weights of a loaded model (the host's BaseModel). Equal names mean equal weights."""
    patcher = base.current_patcher
    known = _names.get(patcher)
    if known is None or known[0] != patcher.patches_uuid:
        known = _names[patcher] = (patcher.patches_uuid, {None: _name(_own_patches(patcher))})
    names = known[1]
    found = [names[None]]
    for hook in getattr(getattr(patcher, "current_hooks", None), "hooks", ()):
        patches = patcher.hook_patches.get(hook.hook_ref)
        if patches:
            if hook.hook_ref not in names:
                names[hook.hook_ref] = _name(patches)
            found.append(f"{names[hook.hook_ref]} x {float(hook.strength)!r}")
    return "+".join(found)


def is_gone(name: str) -> bool:
    """Whether weights of this name can never be in force again, because something they are made of is gone."""
    parts = (_parts_of.get(one.partition(" x ")[0]) for one in name.split("+"))
    return any(kept is None or any(part() is None for part in kept) for kept in parts)


def _own_patches(patcher: Any) -> tuple[Any, ...]:
    """LoRAs and other changes of weights, modules in place of the UNet's, and what wraps weights as they are read."""
    objects = {name: thing for name, thing in patcher.object_patches.items() if name.startswith("diffusion_model")}
    return patcher.patches, objects, getattr(patcher, "weight_wrapper_patches", {})


def _name(thing: Any) -> str:
    """sha256 of a nest of numbers, tensors and objects."""
    parts: list[Any] = []
    name = hashlib.sha256("|".join(_words(thing, parts)).encode()).hexdigest()
    if name not in _parts_of:
        for old in [old for old, kept in _parts_of.items() if any(part() is None for part in kept)]:
            del _parts_of[old]
        _parts_of[name] = [weakref.ref(part) for part in parts]
    return name


def _words(thing: Any, parts: list[Any]) -> Iterator[str]:
    if isinstance(thing, Mapping):
        for key in sorted(thing, key=repr):
            yield repr(key)
            yield from _words(thing[key], parts)
    elif isinstance(thing, (list, tuple)):
        yield f"({len(thing)}"
        for one in thing:
            yield from _words(one, parts)
    elif isinstance(thing, (str, int, float, bool, type(None))):
        yield repr(thing)
    elif not isinstance(thing, Tensor) and hasattr(thing, "weights"):  # the host's adapters: made anew at every run
        yield type(thing).__name__
        yield from _words(thing.weights, parts)
    else:
        yield _serial(thing, parts)


def _serial(thing: Any, parts: list[Any]) -> str:
    try:
        if thing not in _serials:
            _serials[thing] = next(_numbers)
    except TypeError:  # what cannot be watched (a dtype and the like) is named by what it says of itself
        return repr(thing)
    parts.append(thing)
    return f"#{_serials[thing]}"
