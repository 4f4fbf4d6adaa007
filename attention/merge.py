"""Fewer reference tokens: tokens with like keys become one (Bolya et al., "Token Merging: Your ViT But Faster", 2022).

A merged token has its group's mean key and value, and log(size of the group) as a score term, so that the group keeps
its share of the softmax: exactly where the keys are equal, else to first order. Done once per reference.

Legend: N tokens, n tokens so far, a even and b odd ones among them, j joining ones, M tokens left, C channels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .cache import LayerFeatures

SMALL = 256
"""Grids of no more tokens are left whole: they cost little, and their tokens are coarse already."""
MOST_PER_ROUND = 0.25  # of the tokens; in one large step tokens without a like one would have to join as well
BLOCK_NUMBERS = 2**24  # of a block of distances: 64 MiB


def num_left(num_tokens: int, share: float) -> int:
    """How many of a reference's tokens stay at one site. Raises ValueError unless 0 < share <= 1."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"the share of reference tokens is {share!r}, accepted is above 0 and at most 1")
    return num_tokens if num_tokens <= SMALL else max(SMALL, math.ceil(num_tokens * share))


def merged(layer: LayerFeatures, share: float) -> LayerFeatures:
    """A reference's features at one site with this share of its tokens."""
    left = num_left(layer.key.shape[1], share)
    if left == layer.key.shape[1]:
        return layer
    key, value, log_size = merge_tokens(layer.key, layer.value, left)
    return replace(layer, key=key, value=value, log_size=log_size, merged_from=layer.num_tokens)


def merge_tokens(key: Tensor, value: Tensor, left: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `[1, N, C]` -> `[1, M, C]` each, and log sizes `[M]` in float32; left is M.

    With M = N they come back as they are, and None. The same input gives the same result on every run.
    """
    if left >= key.shape[1]:
        return key, value, None
    sums = torch.cat([key[0].float(), value[0].float()], 1)
    sizes = torch.ones(len(sums), device=sums.device)
    while len(sizes) > left:
        surplus = len(sizes) - left  # half of it: where equal tokens sit on one side, the next round parts them
        num_joining = min(math.ceil(surplus / 2), math.ceil(MOST_PER_ROUND * len(sizes)))
        sums, sizes = _round(sums, sizes, key.shape[2], num_joining)
    merged_key, merged_value = (sums / sizes[:, None]).to(key.dtype)[None].split(key.shape[2], 2)
    return merged_key.contiguous(), merged_value.contiguous(), sizes.log()


def _round(sums_n2C: Tensor, sizes_n: Tensor, channels: int, num_joining: int) -> tuple[Tensor, Tensor]:
    """One bipartite matching: of the even tokens, those that an odd one is most like join it."""
    centres = sums_n2C[:, :channels] / sizes_n[:, None]
    order = centres.sum(1).argsort(stable=True)  # like tokens beside each other: one even, one odd
    centres, all_n = centres[order], torch.cat([sums_n2C, sizes_n[:, None]], 1)[order]
    even, odd = all_n[::2], all_n[1::2]
    costs, nearest = _nearest(centres[::2], even[:, -1], centres[1::2], odd[:, -1])
    ranked = costs.argsort(stable=True)
    joining, staying = ranked[:num_joining], ranked[num_joining:]
    member_bj = torch.arange(len(odd), device=odd.device)[:, None] == nearest[joining][None]
    odd = odd + member_bj.to(odd) @ even[joining]  # a product: adding by index has no fixed order on a GPU
    found = torch.cat([even[staying], odd])
    return found[:, :-1], found[:, -1]


def _nearest(a_aC: Tensor, a_sizes: Tensor, b_bC: Tensor, b_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For every a the b whose union with it spreads least (Ward 1963: what joining adds to the squared distances)."""
    costs, places = [], []
    rows = max(1, BLOCK_NUMBERS // len(b_bC))
    for a, size in zip(a_aC.split(rows), a_sizes.split(rows)):
        distance = a.square().sum(1)[:, None] + b_bC.square().sum(1)[None] - 2 * a @ b_bC.T
        factor = size[:, None] * b_sizes[None] / (size[:, None] + b_sizes[None])
        cost, place = (factor * distance.clamp_min(0.0)).min(1)
        costs.append(cost)
        places.append(place)
    return torch.cat(costs), torch.cat(places)
