"""The host's attention kernel as our layers call it: with the host's precision and other packs' override in force.

When memory runs out, the same numbers from fewer queries at a time. The host's `split` and `sub-quad` kernels do so
themselves; PyTorch's, xformers' and the flash ones raise, and the faces make their keys longer. A query's attention
does not depend on the other queries, so any split of them is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("fusedid")

PARTS = (1, 2, 4, 8, 16, 32)
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
OutOfMemory = torch.cuda.OutOfMemoryError


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: dict[str, Any]) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q `[B, Q, C]`, k and v `[B, K, C]`. options: a layer's extra_options.

    Raises the host's out-of-memory error, which makes it free its models, when even small parts do not fit.
    """
    from comfy.ldm.modules.attention import optimized_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        precision = options.get("attn_precision")
        return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)

    return attend_in_parts(attend, q, k, v, heads)


def kernel_name() -> str:
    """What the host calls the kernel that it chose."""
    import comfy.ldm.modules.attention as attention

    return getattr(attention.optimized_attention, "__name__", "unknown")


def attend_in_parts(attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`attend`; in halves, quarters, ... of the queries while memory runs out."""
    for parts in PARTS:
        if parts > 1:
            _make_room(parts)
        out = _tried(attend, q, k, v, heads, parts)
        if out is not None:
            return out
    raise OutOfMemory(
        f"FusedID: not enough memory for attention of {q.shape[0]} x {q.shape[1]} queries over {k.shape[1]} text and "
        f"face keys, not even in {PARTS[-1]} parts. Make a smaller picture or batch, lower reference_size, or use "
        "fewer reference pictures"
    )


def _tried(attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int, parts: int) -> Tensor | None:
    try:
        if parts == 1:
            return attend(q, k, v, heads)
        return torch.cat([attend(some, k, v, heads) for some in q.chunk(parts, dim=1)], dim=1)
    except OutOfMemory:  # left at once: while it is handled, its frames hold what did not fit
        return None


def _make_room(parts: int) -> None:
    import comfy.model_management as management

    log.warning("Out of memory in an attention layer; trying again in %d parts", parts)
    management.soft_empty_cache(True)
