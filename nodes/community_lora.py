"""FaceID's LoRA part on a MODEL, once: whoever put it there, a LoRA loader with the separate file or an earlier node.

The same LoRA is found by what it does to a layer, not by name: the published LoRA file has other tensor names, may be
stored in another precision, and its strength may be in alpha.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.sd
import torch
from torch import Tensor

from ..attention.community.source import CommunityAdapter, adapter_lora
from ..attention.sites import Site

log = logging.getLogger("fusedid")

PROBES = 4
"""Random inputs at which two LoRAs of a layer are compared."""
SAME = 0.02
"""Largest relative difference of the same LoRA in two precisions; bfloat16 keeps 0.4 %."""


@dataclass(frozen=True)
class Carried:
    """A LoRA that a MODEL has already. layers: of how many; lowest, highest: its strength there."""

    layers: int
    lowest: float
    highest: float

    def note(self, name: str) -> str:
        """A line for the report."""
        strength = f"{self.lowest:.3g}"
        if self.highest - self.lowest > 1e-2:
            strength = f"{strength} to {self.highest:.3g}"
        return (
            f"the model already carries the LoRA of {name} (strength {strength}, {self.layers} layers), from a LoRA "
            "loader or an earlier node; it is not added again and lora_strength has no effect"
        )


def with_adapter_lora(model: Any, adapter: CommunityAdapter, sites: Sequence[Site], strength: float) -> Any:
    """A clone of the MODEL with the adapter's LoRA part, through the host's own LoRA path.

    The MODEL itself where the file has none, strength is 0, or the MODEL carries it already. Raises ValueError when the
    host did not take every tensor: half a LoRA would be a silent loss of likeness.
    """
    lora = adapter_lora(adapter, sites)
    if not lora or strength == 0 or _carried(model, lora) is not None:
        return model
    before = _num_patches(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
    added, wanted = _num_patches(patched) - before, len(lora) // 2
    if added != wanted:
        raise ValueError(
            f"{adapter.name}: the host took {added} of the {wanted} LoRA layers of the file, so it does not fit this "
            "model. Use an adapter made for this base model"
        )
    log.info("%s: %d LoRA layers at strength %g", adapter.name, wanted, strength)
    return patched


def carried_lora(model: Any, adapter: CommunityAdapter, sites: Sequence[Site]) -> Carried | None:
    """The adapter's LoRA where the MODEL has it already, else None. What is merged into a checkpoint is not seen."""
    return _carried(model, adapter_lora(adapter, sites))


def _num_patches(model: Any) -> int:
    return sum(len(patches) for patches in model.patches.values())


def _carried(model: Any, lora: Mapping[str, Tensor]) -> Carried | None:
    if not lora or not model.patches:
        return None
    strengths = []
    for key, ours in comfy.lora.load_lora(dict(lora), comfy.lora.model_lora_keys_unet(model.model, {})).items():
        place, offset = (key, None) if isinstance(key, str) else (key[0], key[1])
        found = [
            patch[0] * factor
            for patch in model.patches.get(place, ())
            if patch[3] == offset and (factor := _factor(ours, patch[1])) is not None
        ]
        if abs(sum(found)) > 1e-6:
            strengths.append(sum(found))
    return Carried(len(strengths), min(strengths), max(strengths)) if strengths else None


def _factor(ours: Any, theirs: Any) -> float | None:
    """`theirs / ours` where both change a layer in the same direction, else None."""
    mine, other = _probed(ours), _probed(theirs)
    if mine is None or other is None or mine.shape != other.shape or not mine.any():
        return None
    factor = float((mine * other).sum() / (mine * mine).sum())
    difference = float((other - factor * mine).norm())
    return factor if difference < SAME * abs(factor) * float(mine.norm()) else None


def _probed(patch: Any) -> Tensor | None:
    """What a plain LoRA adds to a layer's output for `PROBES` inputs `[out, PROBES]`; None for other kinds."""
    weights = getattr(patch, "weights", None)
    if getattr(patch, "name", "") != "lora" or weights is None or any(part is not None for part in weights[3:5]):
        return None
    up, down = (weight.detach().float().cpu().flatten(1) for weight in weights[:2])
    if up.shape[1] != down.shape[0]:
        return None
    alpha = 1.0 if weights[2] is None else float(weights[2]) / down.shape[0]
    inputs = torch.randn(down.shape[1], PROBES, generator=torch.Generator().manual_seed(0))
    return alpha * (up @ (down @ inputs))
