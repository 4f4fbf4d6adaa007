"""Additive score terms without a mask: extra channels behind each head's own.

The query carries one factor, the key the other, and their product is the term. So no attention kernel ever needs a
mask: flash, sage and xformers all compute the same thing.

Legend: B rows, N tokens, Q queries, K keys, F factors, h heads, d head width, C = h*d channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""`attend(q [B,Q,C], k [B,K,C], v [B,K,C], heads) -> [B,Q,C]`, scores scaled by 1/sqrt(C/heads)."""

CHANNEL_MULTIPLE = 8  # head widths that tensor cores like
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class WideHeads:
    """Heads of `d` own channels in `width`. The term of a query and a key is what their extra channels' factors say:

    query factors times key factors, summed, equal `gain * balance * term`. Both factors stay moderate so, and
    `balance`, a power of two, is exact in every dtype.
    """

    heads: int
    d: int
    width: int

    @classmethod
    def behind(cls, d: int, heads: int, num_extra: int) -> WideHeads:
        """Room for `num_extra` channels behind `d` own ones."""
        return cls(heads, d, -(-(d + num_extra) // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE)

    @property
    def balance(self) -> float:
        """One of the two factors."""
        return 2.0 ** round(math.log2(self.width) / 4)

    @property
    def gain(self) -> float:
        """The other: undoes the kernel's 1/sqrt(width) for the extra channels."""
        return math.sqrt(self.width) / self.balance

    def widen(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors `[B, N, C]` one after the other as `[B, sum N, h, width]`, extra channels zero: one copy."""
        num_tokens = sum(part.shape[1] for part in parts)
        wide = parts[0].new_empty(parts[0].shape[0], num_tokens, self.heads, self.width)
        start = 0
        for part in parts:
            stop = start + part.shape[1]
            wide[:, start:stop, :, : self.d] = part.unflatten(2, (self.heads, self.d))
            start = stop
        wide[..., self.d :] = 0.0
        return wide

    def keys(self, parts: Sequence[Tensor]) -> Tensor:
        """As `widen`, with the own channels scaled as if the head were `d` wide: keys are fewer than queries."""
        wide = self.widen(parts)
        wide[..., : self.d] *= math.sqrt(self.width / self.d)
        return wide

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """The kernel on wide tensors, own channels of the result: `[B, Q, C]`."""
        out = attend(q.flatten(2), k.flatten(2), v.flatten(2), self.heads)
        return out.unflatten(2, (self.heads, self.width))[..., : self.d].flatten(2)


def attend_with_factors(
    q: Tensor, k: Tensor, v: Tensor, q_QF: Tensor, k_KF: Tensor, heads: int, attend: Attend
) -> Tensor:
    """Attention with scores q k^T / sqrt(d) + q_QF k_KF^T: the factors ride in extra head channels."""
    d, half = q.shape[2] // heads, q.dtype in HALF
    wide = WideHeads.behind(d, heads, q_QF.shape[1] * (3 if half else 1))
    factors_q, factors_k = q_QF * wide.gain, k_KF * wide.balance
    if half:  # of the product of two sums, all but the product of the remainders
        (q_high, q_low), (k_high, k_low) = split_tensor(factors_q, q.dtype), split_tensor(factors_k, q.dtype)
        factors_q, factors_k = torch.cat([q_high, q_high, q_low], 1), torch.cat([k_high, k_low, k_high], 1)
    wide_q, wide_k = wide.widen([q]), wide.keys([k])
    stop = d + factors_q.shape[1]
    wide_q[..., d:stop], wide_k[..., d:stop] = factors_q[:, None].to(q), factors_k[:, None].to(k)
    return wide.attend(wide_q, wide_k, wide.widen([v]), attend)


def num_parts(dtype: torch.dtype) -> int:
    """Numbers of `dtype` that together hold a factor: half precision needs a remainder beside the rounded number."""
    return 2 if dtype in HALF else 1


def split_tensor(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x in float32 as the sum of `num_parts` tensors that `dtype` holds without losing what counts."""
    x = x.float()
    if dtype not in HALF:
        return (x,)
    high = x.to(dtype).float()
    return high, x - high


def split_number(x: float, dtype: torch.dtype) -> tuple[float, ...]:
    """As `split_tensor`, without a tensor."""
    if dtype not in HALF:
        return (x,)
    step = torch.finfo(dtype).eps * 2.0 ** (math.frexp(x)[1] - 1)
    high = round(x / step) * step
    return high, x - high
