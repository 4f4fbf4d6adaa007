"""The text side of a cross-attention layer when a prompt speaks to several people (METHOD 2.3).

Whoever replaces this layer and adds faces uses `text_attention` where it would use the host's attention, and
`routed_rows` with its own face regions: then text spans and faces share one softmax, and both patches may be applied in
any order. Such a replacement says so by an attribute `routes_text = True`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..attention.fusion import fused_attention
from ..attention.routing import Region
from .attention_in_parts import attend_in_parts

SPANS_KEY = "fusedid_guidance_spans"
"""Where a patched MODEL's transformer_options hold its `GuidanceSpans`."""

Options = dict[str, Any]
Layer = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
Rows = list[tuple[slice, tuple[Region, ...]]]


def routed_rows(q: Tensor, options: Options, faces: tuple[Region, ...] | None = None) -> Rows:
    """The rows of q `[B, Q, C]` whose prompt is routed, with the regions their queries fall into.

    faces: regions by face of these rows; the result then is their common refinement with the text spans. Empty when
    the MODEL or this step's conditioning routes nothing.
    """
    spans = options.get(SPANS_KEY)
    return [] if spans is None else spans.rows(options, q.shape[0], q.shape[1], q.device, faces)


def text_attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """The layer's attention without faces: the host's, bit for bit, except for rows whose prompt is routed."""
    out = host_attention(q, k, v, options)
    for rows, regions in routed_rows(q, options):
        out[rows] = fused_attention(
            q[rows], k[rows], v[rows], (), heads=options["n_heads"], attend=_attend(options), regions=regions
        )
    return out


def host_attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """What the unpatched layer computes, with other packs' attention override in force."""
    return _attend(options)(q, k, v, options["n_heads"])


def _attend(options: Options) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    from comfy.ldm.modules.attention import optimized_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        precision = options.get("attn_precision")
        return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)

    return partial(attend_in_parts, attend)


class TextSlot:
    """One layer's replacement that only routes text. previous: who had the layer before, or None.

    What a predecessor adds to the text attention stays, and packs that come later may `.add` (IPAdapter_plus'
    protocol). The host copies replacements at every clone: a copy has a list of additions of its own.
    """

    routes_text = True

    def __init__(self, previous: Layer | None, added: Sequence[tuple[Callable[..., Tensor], Options]] = ()) -> None:
        self._previous = previous
        self._added = list(added)

    @property
    def only_routes_text(self) -> bool:
        """Whether the output is `text_attention`'s, with nothing of another pack's in it."""
        return self._previous is None and not self._added

    def add(self, callback: Callable[..., Tensor], **options: Any) -> None:
        """`callback(out, q, k, v, extra_options, **options)` is added between `sigma_end` and `sigma_start`."""
        self._added.append((callback, options))

    def to(self, *_: Any, **__: Any) -> TextSlot:
        """The host moves replacements that have this method; this one holds no tensors."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TextSlot:
        return TextSlot(copy.deepcopy(self._previous, memo), self._added)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        out = text_attention(q, k, v, extra_options)
        if self._previous is not None:
            before = self._previous(q, k, v, extra_options)
            out = before + (out - host_attention(q, k, v, extra_options)) if routed_rows(q, extra_options) else before
        sigma = float(extra_options["sigmas"][0]) if self._added and "sigmas" in extra_options else float("inf")
        for callback, options in self._added:
            if options.get("sigma_end", 0.0) <= sigma <= options.get("sigma_start", float("inf")):
                out = out + callback(out, q, k, v, extra_options, **options)
        return out.to(q.dtype)
