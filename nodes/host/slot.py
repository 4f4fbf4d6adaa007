"""Our place in an attention layer: what we add there, beside whoever else was put there.

The host asks one function per layer for its output, by a name of three parts and, where there is none, by one of two.
Which function other packs want there is only known when the layer is about to run: some set theirs after our node, some
for a single pass of a step. So nothing of ours stands in a MODEL's `patches_replace`; a `Slot` takes its place for the
duration of one call, with what the host would have asked inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...attention.sites import Site
from .effect import Acts, Effects
from .layer_call import LayerCall
from .messages import named_in_errors

Options = dict[str, Any]
Layer = Callable[[Tensor, Tensor, Tensor, Options], Tensor]

ACTS = "fusedid_acts"
"""Where a call's transformer_options hold its `Acts`."""


class Slot:
    """One layer of a MODEL with effects."""

    def __init__(self, attention: str, site: Site) -> None:
        self._attention, self._site = attention, site
        self._uncompiled: Layer | None = None

    def to(self, *_: Any, **__: Any) -> Slot:
        """The host moves patches that have this method; ours holds no tensors."""
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> Slot:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        # A compiled UNet leaves its graph here: our state changes at every call, and a graph of it would be made anew
        # each time. Without a compiler in the process nothing of it is imported, which would take seconds.
        if "torch._dynamo" not in sys.modules:
            return self._attend(q, k, v, extra_options)
        if self._uncompiled is None:
            self._uncompiled = torch.compiler.disable(self._attend)
        return self._uncompiled(q, k, v, extra_options)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        acts: Acts = extra_options[ACTS]
        key = self._site.key
        router = acts.routing.router if acts.routing is not None and self._attention == "attn2" else None
        call = LayerCall(acts.call, q, k, v, extra_options, router)
        changes = []
        for one in acts.at(self._attention, key):
            with named_in_errors(one.label):
                changes.append(one.change(self._site, call))
        acts.acted.add((self._attention, key))
        other: Layer | None = acts.others.get((self._attention, key))
        if other is None and len(changes) == 1:
            return call.with_change(changes[0])
        plain = call.plain  # first: some packs write into the queries that they are given
        out = plain if other is None else other(q, k, v, extra_options)
        if other is not None and call.routed_text():
            out = out + (plain - call.host)
        # Each adds what it would add alone: exact for packs that add to the layer's attention, and symmetric.
        for change in changes:
            for rows, values in change:
                out = _added(out, rows, values - plain[rows])
        return out.to(q.dtype)


def _added(out: Tensor, rows: slice, more: Tensor) -> Tensor:
    """`out` with something added to some rows; other packs may hold on to their tensor, so it is left as it is."""
    if (rows.start, rows.stop) == (0, out.shape[0]):
        return out + more
    changed = out.clone()
    changed[rows] += more
    return changed


def with_slots(options: Options, effects: Effects, acts: Acts) -> Options:
    """A call's transformer_options with our slots in it. What they stand for is noted in `acts.others`."""
    replaced = dict(options.get("patches_replace", {}))
    for (attention, key), site in acts.sites().items():
        layers = replaced[attention] = dict(replaced.get(attention, {}))
        other = layers.get(key, layers.get(key[:2]))
        if isinstance(other, Slot):  # options of a call, used again for a call inside it
            other = options[ACTS].others.get((attention, key)) if ACTS in options else None
        acts.others[attention, key] = other
        layers[key] = effects.slots.setdefault((attention, key), Slot(attention, site))
    acts.replaced = replaced
    return {**options, "patches_replace": replaced, ACTS: acts}
