"""One call of one attention layer: the host's options read once, and what our layers need of them.

Legend: B rows of the layer, Q queries, K keys, C channels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ...attention.fusion import fused_attention
from ...attention.routing import Region
from .kernel import kernel_attention
from .messages import named_in_errors
from .model_call import ModelCall
from .place import Place
from .rows import Chunk, chunks_of, picture_by_picture
from .sampling import size_of

CLIP_WINDOW = 77

Rows = list[tuple[slice, tuple[Region, ...]]]
"""Rows of a layer, and the regions that their queries fall into."""
Change = list[tuple[slice, Tensor]]
"""Rows of a layer, and their whole output `[rows, Q, C]` in place of the host's."""


class TextRouter(Protocol):
    """Whoever decides which text keys a query sees. label: the node's name, for messages."""

    label: str

    def rows(self, call: LayerCall, faces: tuple[Region, ...] | None = None) -> Rows:
        """The rows whose text is routed. faces: regions by face to be met by the text's."""
        ...


class LayerCall:
    """q `[B, Q, C]`, k and v `[B, K, C]`: as the host projected them. options: its extra_options for this layer."""

    def __init__(
        self, model: ModelCall, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], router: TextRouter | None
    ) -> None:
        self.model, self.q, self.options, self._router = model, q, options, router
        # A pack that tiles the queries alone leaves the keys whole; the host's kernels then read them as so many tiles.
        self.k, self.v = (t if len(t) == len(q) else t.reshape(len(q), -1, t.shape[-1]) for t in (k, v))
        self.heads: int = options["n_heads"]
        _, _, height, width = options["activations_shape"]
        self.grid: tuple[int, int] = (height, width)

    @cached_property
    def chunks(self) -> Sequence[Chunk]:
        """The rows of every prompt in the call. Raises ValueError when they cannot be told."""
        rows, tokens = self.q.shape[:2]
        tiled = tokens < self.num_tokens
        chunks = chunks_of(rows, self.model.prompts, self.model.kinds, self._num_latents, tiled=tiled)
        return picture_by_picture(chunks) if self.model.views_differ and rows == self._num_latents else chunks

    @property
    def _num_latents(self) -> int:
        return int(self.options["activations_shape"][0])

    @property
    def repeated(self) -> bool:
        """Whether another node made more rows than the model has."""
        return len(self.q) > self._num_latents

    @property
    def num_tokens(self) -> int:
        """Of the layer's grid, whatever other packs made of them."""
        return self.grid[0] * self.grid[1]

    @property
    def has_grid(self) -> bool:
        """Whether query n is cell n of the grid: no other node merged or tiled the tokens."""
        return self.q.shape[1] == self.num_tokens

    def require_grid(self, what: str, instead: str) -> None:
        """Raises ValueError when another node merged or tiled the tokens, so that `what` cannot be told apart."""
        if not self.has_grid:
            raise ValueError(
                f"another node merges or tiles the tokens of this layer ({self.q.shape[1]} instead of {self.grid[0]} x "
                f"{self.grid[1]}), so {what} cannot be placed. Remove it (HyperTile, ToMe), or {instead}"
            )

    def place(self, chunk: Chunk) -> Place:
        """The part of the picture that a chunk's rows show. Rows of nobody's are taken for the whole."""
        if chunk.number is None:
            return Place(size_of(self.model.x))
        return self.model.place(chunk.number, chunk.picture)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """The host's kernel. heads may differ from the layer's."""
        options = self.options if heads == self.heads else {**self.options, "n_heads": heads}
        return kernel_attention(q, k, v, heads, options)

    @cached_property
    def host(self) -> Tensor:
        """The host's own attention `[B, Q, C]`."""
        return self.attend(self.q, self.k, self.v, self.heads)

    def routed_text(self, faces: tuple[Region, ...] | None = None) -> Rows:
        """The rows whose text is routed, with their regions; see `TextRouter`."""
        if self._router is None:
            return []
        with named_in_errors(self._router.label):
            return self._router.rows(self, faces)

    @cached_property
    def plain(self) -> Tensor:
        """The layer without faces `[B, Q, C]`: the host's attention, but for rows whose text is routed."""
        routed = self.routed_text()
        if not routed:
            return self.host
        out = self.host.clone()
        for rows, regions in routed:
            out[rows] = self.text_attention(rows, regions)
        return out

    def text_attention(self, rows: slice, regions: tuple[Region, ...]) -> Tensor:
        """Attention of rows whose queries see the text spans of their regions, and no face."""
        q, k, v = self.q[rows], self.k[rows], self.v[rows]
        return fused_attention(q, k, v, (), heads=self.heads, attend=self.attend, regions=regions)

    def with_change(self, change: Change) -> Tensor:
        """Changed rows, and the layer without faces between them, of which no more is computed than is shown."""
        if self._router is not None and self.routed_text():
            out = self.plain.clone()
            for rows, values in change:
                out[rows] = values
            return out
        gaps = gaps_between([rows for rows, _ in change], self.q.shape[0])
        plain = [(rows, self.attend(self.q[rows], self.k[rows], self.v[rows], self.heads)) for rows in gaps]
        pieces = [values for _, values in sorted([*change, *plain], key=lambda piece: piece[0].start)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def texts_of(self, chunk: Chunk) -> list[tuple[slice, slice]]:
        """The chunk's rows, and the keys that hold their text once.

        The host repeats short texts to the longest one's length, and packs that give regions texts of their own do so
        too. Copies do not change a text's own attention, but beside a face they would weigh more.
        """
        own, context, length = chunk.prompt.text, self.model.context, self.k.shape[1]
        if own is None or context is None:
            return [(chunk.rows, slice(0, length))]
        if self.k.shape[:2] == context.shape[:2]:  # by no other pack changed
            return [(chunk.rows, slice(0, own.shape[1]))]
        if not self.repeated:
            return [(chunk.rows, slice(0, length))]
        batch = self._num_latents // len(self.model.prompts)
        regions = [slice(start, start + batch) for start in range(chunk.rows.start, chunk.rows.stop, batch)]
        lengths = self.model.keep(
            ("texts", chunk.number, length), lambda: [text_length(self.k[rows.start], own.shape[1]) for rows in regions]
        )
        return [(rows, slice(0, one)) for rows, one in zip(regions, lengths, strict=True)]


def gaps_between(rows: Sequence[slice], num_rows: int) -> list[slice]:
    """What lies before, between and behind slices of rows."""
    edges = [0, *(edge for one in sorted(rows, key=lambda s: s.start) for edge in (one.start, one.stop)), num_rows]
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]


def text_length(keys_KC: Tensor, own_length: int) -> int:
    """Length of the text that keys `[K, C]` hold once or several times over. Waits for the device.

    Texts come in multiples of CLIP's window; a prompt of another length than such has a window of its own.
    """
    window = CLIP_WINDOW if own_length % CLIP_WINDOW == 0 else own_length
    total = keys_KC.shape[0]
    for length in range(window, total, window):
        if total % length == 0 and torch.equal(keys_KC[:-length], keys_KC[length:]):
            return length
    return total
