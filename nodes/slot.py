"""Our place in an attention layer: wraps who was there before, and lets packs that come later add to it.

IPAdapter_plus, InstantID and PuLID_ComfyUI call `.add(callback, **options)` on whatever object they find, so this
speaks that protocol. The host copies `model_options` deeply at every clone: a copy shares our state but has a list of
additions of its own, so that adding to a clone leaves the original as it was.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.sites import Site
from .guidance_slot import Layer, Options, host_attention, text_attention

Replacement = Callable[[Tensor, Tensor, Tensor, Options], "Tensor | None"]
"""The layer's whole output `[B, Q, C]` with our faces, or None when we change nothing at this step."""


class Slot:
    """One layer's replacement. replacement: ours. plain: the layer without us. previous: who had the slot, or None."""

    routes_text = True

    def __init__(
        self,
        replacement: Replacement,
        plain: Layer = text_attention,
        previous: Layer | None = None,
        added: Sequence[tuple[Callable[..., Tensor], Options]] = (),
    ) -> None:
        self._replacement = replacement
        self._plain = plain
        self._previous = previous
        self._added = list(added)
        self._uncompiled: Layer | None = None

    def add(self, callback: Callable[..., Tensor], **options: Any) -> None:
        """The protocol of IPAdapter_plus: `callback(out, q, k, v, extra_options, **options)` is added to the output."""
        self._added.append((callback, options))

    def to(self, *_: Any, **__: Any) -> Slot:
        """The host moves patches that have this method; ours move their tensors when used."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot(self._replacement, self._plain, copy.deepcopy(self._previous, memo), self._added)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        # A compiled UNet leaves its graph here: our state changes at every call, and a graph of it would be made anew
        # each time. Without a compiler in the process nothing of it is imported, which would take seconds.
        if "torch._dynamo" not in sys.modules:
            return self._attend(q, k, v, extra_options)
        if self._uncompiled is None:
            self._uncompiled = torch.compiler.disable(self._attend)
        return self._uncompiled(q, k, v, extra_options)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        out = self._own(q, k, v, extra_options)
        if not self._added:
            return out
        # Those packs check their window per layer too, so this reads the noise level no more often than they did.
        sigma = float(extra_options["sigmas"][0]) if "sigmas" in extra_options else float("inf")
        for callback, options in self._added:
            if options.get("sigma_end", 0.0) <= sigma <= options.get("sigma_start", float("inf")):
                out = out + callback(out, q, k, v, extra_options, **options)
        return out.to(q.dtype)

    def _own(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        ours = self._replacement(q, k, v, extra_options)
        # A predecessor that only routes text is what `plain` computes: the order of the two nodes changes no bit.
        if self._previous is None or getattr(self._previous, "only_routes_text", False):
            return self._plain(q, k, v, extra_options) if ours is None else ours
        before = self._previous(q, k, v, extra_options)
        if ours is None:
            return before
        # Exact for packs that add to the layer's attention, which is what a predecessor here does.
        plain = self._plain if getattr(self._previous, "routes_text", False) else host_attention
        return before + (ours - plain(q, k, v, extra_options))


def install(model: Any, attention: str, sites: Sequence[Site], replacement_for: Callable[[Site], Replacement]) -> int:
    """Puts a slot into `attention` (attn1, attn2) of every site of a MODEL (a clone of the caller's); returns how many.

    A block with one transformer is known to other packs by two parts (IPAdapter_plus on SD1.5) while the host asks for
    three first: there the same slot sits under both names, or one of us would be hidden from the host.
    """
    options = model.model_options["transformer_options"] = model.model_options["transformer_options"].copy()
    replaced = options["patches_replace"] = options.get("patches_replace", {}).copy()
    slots = replaced[attention] = replaced.get(attention, {}).copy()
    plain = text_attention if attention == "attn2" else host_attention
    depth = Counter(site.key[:2] for site in sites)
    for site in sites:
        block = site.key[:2]
        slot = Slot(replacement_for(site), plain, slots.get(site.key, slots.get(block)))
        slots[site.key] = slot
        if depth[block] == 1:
            slots[block] = slot
    return sum(isinstance(slots.get(site.key), Slot) for site in sites)
