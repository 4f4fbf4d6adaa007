"""Values of widgets against the schema that declares them.

The host checks what was typed, but neither NaN nor anything that comes through a link: a number from another node may
be of any size, and would end as a black picture or a full memory instead of a message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_api.v0_0_2 import io


def require_in_range(node: type[io.ComfyNode], given: Mapping[str, Any], *, files: tuple[str, ...] = ()) -> None:
    """Raises ValueError that names the input unless every given number and choice is one the schema accepts.

    files: drop-downs of files, which the node itself looks for: what was saved in a workflow may have moved since.
    """
    for entry in node.define_schema().inputs:
        value = given.get(entry.id)
        if value is None or entry.id in files:
            continue
        if isinstance(entry, (io.Int.Input, io.Float.Input)):
            _require_number(entry, value)
        elif isinstance(entry, io.Combo.Input) and value not in entry.options:
            raise ValueError(f"{entry.id} is {value!r}; choose one of: {', '.join(map(str, entry.options))}")


def _require_number(entry: Any, value: Any) -> None:
    low, high = (-math.inf if entry.min is None else entry.min), (math.inf if entry.max is None else entry.max)
    if not low <= value <= high:  # false for NaN as well
        raise ValueError(f"{entry.id} is {value!r}, accepted is {low:g} to {high:g}. Look at the node linked to it")
