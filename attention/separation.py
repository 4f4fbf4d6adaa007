"""Self-attention separation: a finite bias that makes people look less at each other (PEERS finding 12).

Routing cross-attention alone does not isolate people, because self-attention still sees the whole latent. Here a query
of person i and a key of person j != i get the score term `-amount`; background queries and keys stay free, so light and
composition remain one picture. The term rides in extra head channels (see `wide_heads.py`): no kernel needs a mask.

Legend: B rows, Q tokens of the layer, K keys, I identities, h heads, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fusion import sdpa_attend
from .grid import exclusive_tokens, masks_to_tokens
from .wide_heads import Attend, attend_with_factors

LARGEST_AMOUNT = 20.0  # e^-20: beyond it nothing changes any more


def check_amount(amount: float) -> None:
    """Raises ValueError unless the amount lies in [0, LARGEST_AMOUNT]."""
    if not (math.isfinite(amount) and 0.0 <= amount <= LARGEST_AMOUNT):
        raise ValueError(
            f"self-attention separation is {amount:g}, accepted is 0 (off) to {LARGEST_AMOUNT:g}. "
            "Start at 2 and raise it when people still take each other's features"
        )


def memberships(masks_IHW: Tensor, grid_hw: tuple[int, int], elsewhere_I: Tensor | None = None) -> Tensor:
    """Who owns which token: `[I, Q]` of zeros and ones, from resolved masks `[I, H, W]`.

    elsewhere_I: see `grid.exclusive_tokens`.
    """
    return exclusive_tokens(masks_to_tokens(masks_IHW, grid_hw), grid_hw, elsewhere_I)


def separation_factors(member_IQ: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    """Factors `[Q, I]` and `[K, I]` whose product is -amount between different people and 0 elsewhere.

    sum_i k_i (m - q_i), with m = sum_i q_i: a query of person i meets only the other people's keys.
    """
    member_QI = member_IQ.T.float()
    others_QI = member_QI.sum(1, keepdim=True) - member_QI
    return -amount * others_QI, member_QI


def separated_attention(
    q: Tensor, k: Tensor, v: Tensor, member_IQ: Tensor, amount: float, *, heads: int, attend: Attend = sdpa_attend
) -> Tensor:
    """softmax(q k^T / sqrt(d) + term) v with the term above. q `[B, Q, C]`, k, v `[B, K, C]`, K >= Q.

    Keys behind the first Q (another pack's reference tokens) belong to nobody and stay free. `amount` 0 is `attend`.
    """
    if amount == 0.0:
        return attend(q, k, v, heads)
    q_QI, k_QI = separation_factors(member_IQ.to(q.device), amount)
    free = k_QI.new_zeros(k.shape[1] - k_QI.shape[0], k_QI.shape[1])
    return attend_with_factors(q, k, v, q_QI, torch.cat([k_QI, free]), heads, attend)
