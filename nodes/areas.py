"""Which part of the latent every prompt of a model call shows (area conditioning), told to the attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

AREAS = "fusedid_areas"
"""Where a call's transformer_options hold ((height, width) of the whole latent, {uuid: area})."""

Area = tuple[int, int, int, int]
"""(height, width, y, x) in latent pixels, the host's order."""


def note_areas(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Any, options: Any, *rest: Any) -> Any:
    """A CALC_COND_BATCH wrapper. It copies the host's options, and may be installed more than once."""
    areas = {
        cond["uuid"]: tuple(int(n) for n in cond["area"])
        for group in conds
        for cond in group or ()
        if "uuid" in cond and len(cond.get("area") or ()) == 4
    }
    noted = {**options.get("transformer_options", {}), AREAS: (tuple(x.shape[-2:]), areas)}
    return executor(model, conds, x, timestep, {**options, "transformer_options": noted}, *rest)


def chunk_areas(options: Mapping[str, Any]) -> tuple[tuple[int, int], list[Area | None]]:
    """Size of the whole latent, and for every chunk of the batch its area, None where it shows the whole latent."""
    full_hw, areas = options.get(AREAS, (tuple(options["activations_shape"][-2:]), {}))
    return full_hw, [areas.get(uuid) for uuid in options.get("uuids", ())] or [None]
