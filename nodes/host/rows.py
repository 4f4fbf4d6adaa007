"""Which rows of a layer belong to which prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .prompts import UNKNOWN, Prompt

NEGATIVE_NUMBER = 1
"""Packs that repeat rows per region leave the prompt with this number alone, whoever it is."""


class Chunk(NamedTuple):
    """Rows [start, stop) of a layer, and whose they are.

    number: the prompt's in the call, None for nobody's. picture: of the batch, None for all of them.
    """

    prompt: Prompt
    rows: slice
    number: int | None = None
    picture: int | None = None


def chunks_of(
    num_rows: int, prompts: Sequence[Prompt], kinds: Sequence[int], num_latents: int, *, tiled: bool = False
) -> list[Chunk]:
    """The rows of every prompt, in order.

    kinds: the host's `cond_or_uncond`. num_latents: rows of the UNet's input (`activations_shape[0]`). Attention-couple
    packs repeat the rows of every chunk whose number is not 1 once per region; packs that tile the queries (tiled: a
    row has fewer of them) make the same number of rows of every chunk. Fewer rows than latents are a selection of
    another pack's, and nobody's. Raises ValueError when the rows fit no such layout: guessing would give a person to
    the wrong prompt.
    """
    batch = num_latents // len(kinds)
    if num_rows < num_latents:
        return [Chunk(UNKNOWN, slice(0, num_rows))]
    alone = [kind == NEGATIVE_NUMBER and not tiled for kind in kinds]
    most = (num_rows - sum(alone) * batch) // (max(1, len(kinds) - sum(alone)) * batch)
    repeats = [1 if one else most for one in alone]
    if sum(repeats) * batch != num_rows or 0 in repeats:
        raise ValueError(
            f"another node changed the attention batch to {num_rows} rows for {num_latents} latents in a way FusedID "
            "does not know. Remove that node"
        )
    chunks, start = [], 0
    for number, (prompt, repeat) in enumerate(zip(prompts, repeats, strict=True)):
        chunks.append(Chunk(prompt, slice(start, start + repeat * batch), number))
        start += repeat * batch
    return chunks


def picture_by_picture(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Chunks of one row each, where the pictures of a batch show different things."""
    return [
        chunk._replace(rows=slice(row, row + 1), picture=row - chunk.rows.start)
        for chunk in chunks
        for row in range(chunk.rows.start, chunk.rows.stop)
    ]
