"""Which rows of a layer's batch belong to the positive prompt."""

from __future__ import annotations

from collections.abc import Sequence


def positive_rows(num_rows: int, kinds: Sequence[int], num_latents: int) -> list[tuple[int, int]]:
    """Spans [start, stop) of the positive rows.

    kinds: the host's `cond_or_uncond` (0 positive, 1 negative), one per chunk. num_latents: rows of the UNet's input
    (`activations_shape[0]`). Attention-couple packs repeat the rows of every positive chunk once per region.
    Raises ValueError when the rows fit no such layout: guessing would give a person to the wrong prompt.
    """
    batch = num_latents // len(kinds)
    num_positive = sum(kind == 0 for kind in kinds)
    rest = num_rows - (len(kinds) - num_positive) * batch
    regions = rest // (num_positive * batch) if num_positive else 1
    if regions < 1 or rest != num_positive * batch * regions:
        raise ValueError(
            f"another node changed the attention batch to {num_rows} rows for {num_latents} latents in a way FusedID "
            "does not know. Remove that node, or place it before FusedIDAttentionPatch"
        )
    spans, start = [], 0
    for kind in kinds:
        stop = start + batch * (regions if kind == 0 else 1)
        if kind == 0:
            spans.append((start, stop))
        start = stop
    return spans
