"""PuLID's orthogonal projections: what the face's output shares with the text's is taken from it, whole or in part.

Legend: B rows, Q queries, K face keys, C = h*d channels, h heads.

Both outputs are seen as one vector per channel, over all queries. The text's output T and the face's F give

    P = T <T, F> / <T, T>        (per row and channel; what of F lies along T)
    out = T + strength * (F - (1 - kept) P)

with kept = 0 (v1), or the share of attention on the leading tokens of the face (v2), so that v2 keeps more of P where a
pixel looks at them. Sources: PuLID `pulid/attention_processor.py` (arXiv 2404.16022), PuLID_ComfyUI `pulid.py`; the two
compute v2's share differently, hence two choices.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

OFF, V1, V2, V2_COMFYUI = "off", "v1", "v2", "v2 as PuLID_ComfyUI"
ORTHOGONAL = (OFF, V1, V2, V2_COMFYUI)
LEADING = 5
"""How many tokens of a face lead: PuLID v1's identity tokens come first and are five."""


def require_orthogonal(orthogonal: str) -> None:
    """Raises ValueError unless it is one of `ORTHOGONAL`."""
    if orthogonal not in ORTHOGONAL:
        raise ValueError(f"unknown orthogonal projection {orthogonal!r}; known: {', '.join(ORTHOGONAL)}")


def orthogonal_branch(face: Tensor, text: Tensor, kept: Tensor | float = 0.0) -> Tensor:
    """`F - (1 - kept) P` in F's dtype, computed in float32. face, text: `[B, Q, C]`; kept: `[B, Q or 1, 1]`.

    A channel in which the text's output is zero loses nothing.
    """
    F, T = face.float(), text.float()
    length = (T * T).sum(1, keepdim=True)
    along = (T * F).sum(1, keepdim=True) / torch.where(length > 0, length, 1.0)
    return (F - (1.0 - kept) * along * T).to(face.dtype)


def leading_share(
    q: Tensor, keys: Tensor, leading_K: Tensor, form: str, *, heads: int, bias: Tensor | None = None
) -> Tensor:
    """v2's `kept`: the share of the face's attention on its leading tokens, float32.

    q `[B, Q, C]`, keys `[B, K, C]`, leading_K bool `[K]`, bias added to the scores `[Q or 1, K]`. The scores are Q K^T
    without 1/sqrt(d), as in both sources. `v2`: a softmax per head, averaged over the heads -> `[B, Q, 1]`.
    `v2 as PuLID_ComfyUI`: one softmax over all channels, averaged over the queries -> `[B, 1, 1]`.
    """
    num = heads if form == V2 else 1
    q, keys = (rearrange(t.float(), "b n (h d) -> b h n d", h=num) for t in (q, keys))
    scores = q @ keys.transpose(-2, -1)
    share = (scores if bias is None else scores + bias).softmax(-1)[..., leading_K].sum(-1)
    return share.mean(1)[..., None] if form == V2 else share.mean(2)[..., None]


def leading_tokens(lengths: list[int], device: torch.device) -> Tensor:
    """Bool `[sum of lengths]`: the first `LEADING` keys of every face."""
    return torch.cat([torch.arange(length, device=device) < LEADING for length in lengths])
