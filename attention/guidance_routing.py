"""Multi-identity cross-attention (METHOD 2.3): region i's queries attend to identity i's guidance only.

The context holds one group of T guidance tokens per identity, in the identities' order, and behind them one more group,
their mean, where the background asks for it. A query's group is a span of text keys, so `fusion.fused_attention` does
the rest, with or without fused faces in the same softmax.

Legend: I identities, H W image pixels, Q query tokens of one layer, T guidance tokens per group, C context width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .grid import exclusive_tokens, masks_to_tokens
from .routing import Region

GuidanceBackground = Literal["random", "mean", "first", "freeze"]
GUIDANCE_BACKGROUNDS: tuple[GuidanceBackground, ...] = ("random", "mean", "first", "freeze")
WITH_MEAN = ("mean", "freeze")


@dataclass(frozen=True, eq=False)
class GuidanceRouting:
    """What a CONDITIONING made for several identities says about its tokens.

    masks: resolved masks `[I, H, W]`, in the order of the groups. num_tokens: T. background: policy for queries in no
    mask. seed: of the `random` policy.
    """

    masks: Tensor
    num_tokens: int
    background: GuidanceBackground
    seed: int = 0

    @property
    def num_keys(self) -> int:
        """Length of the context these spans are made for."""
        return self.num_tokens * (len(self.masks) + (self.background in WITH_MEAN))


def check_background(background: str) -> None:
    """Raises ValueError for an unknown background policy."""
    if background not in GUIDANCE_BACKGROUNDS:
        raise ValueError(f"unknown guidance background {background!r}; accepted: {', '.join(GUIDANCE_BACKGROUNDS)}")


def guidance_context(tokens_ITC: Tensor, background: GuidanceBackground) -> Tensor:
    """All groups one behind the other: `[I, T, C]` -> `[1, I*T or (I+1)*T, C]`."""
    check_background(background)
    groups = [tokens_ITC.flatten(0, 1)]
    if background in WITH_MEAN:
        groups.append(tokens_ITC.mean(0))
    return torch.cat(groups)[None]


def guidance_groups(
    masks_IHW: Tensor,
    grid_hw: tuple[int, int],
    *,
    background: GuidanceBackground,
    seed: int = 0,
    elsewhere_I: Tensor | None = None,
) -> Tensor:
    """The group every query attends to: `[Q]` int64, 0..I-1 an identity, I the mean.

    Receives: resolved masks `[I, H, W]` in [0, 1]; the layer's token grid. Ownership is hard: a softmax over two
    people's guidance would be a third person. `random` draws from `seed` and the grid, so it is the same at every step,
    and it draws by the people's places, so the order in which they are wired does not matter.
    """
    check_background(background)
    owned_IQ = exclusive_tokens(masks_to_tokens(masks_IHW, grid_hw), grid_hw, elsewhere_I).cpu()
    num = owned_IQ.shape[0]
    groups = owned_IQ.argmax(0)
    free = owned_IQ.sum(0) == 0
    if background == "random":
        drawn = _draw(num, owned_IQ.shape[1], seed)
        fill = torch.tensor(_by_place(masks_IHW))[drawn]
    else:
        fill = torch.full_like(groups, 0 if background == "first" else num)
    return torch.where(free, fill, groups)


def _draw(num: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    return torch.randint(num, (count,), generator=generator)


def _by_place(masks_IHW: Tensor) -> list[int]:
    """Identities from left to right, then top to bottom, then by area: an order that the masks alone decide."""
    masks = masks_IHW.float().cpu()
    area = masks.sum((1, 2)).clamp_min(1e-12)
    columns = (masks.sum(1) * (torch.arange(masks.shape[2]) + 0.5)).sum(1) / area
    rows = (masks.sum(2) * (torch.arange(masks.shape[1]) + 0.5)).sum(1) / area
    return sorted(range(len(masks)), key=lambda i: (float(columns[i]), float(rows[i]), float(area[i])))


def spans(groups_Q: Tensor, num_tokens: int) -> tuple[Region, ...]:
    """Regions that see no face and one group's span of text keys each. Every query is in exactly one."""
    present = [int(g) for g in torch.unique(groups_Q)]
    text = {g: (g * num_tokens, (g + 1) * num_tokens) for g in present}
    if len(present) == 1:
        return (Region(None, (), text=text[present[0]]),)
    return tuple(Region((groups_Q == g).nonzero()[:, 0], (), text=text[g]) for g in present)


def guidance_regions(
    routing: GuidanceRouting, grid_hw: tuple[int, int], elsewhere_I: Tensor | None = None
) -> tuple[Region, ...]:
    """Regions of one layer for `fusion.fused_attention` (METHOD 2.3). elsewhere_I: see `grid.exclusive_tokens`."""
    groups = guidance_groups(
        routing.masks, grid_hw, background=routing.background, seed=routing.seed, elsewhere_I=elsewhere_I
    )
    return spans(groups, routing.num_tokens)


def intersect(faces: tuple[Region, ...], texts: tuple[Region, ...], num_queries: int) -> tuple[Region, ...]:
    """Both partitions at once: each query keeps the faces and soft weights of one and the text span of the other.

    Receives: regions by face (`routing.route`) and regions by text span (`guidance_regions`), both of `num_queries`
    queries. Returns: the regions of their common refinement; exact, since no query's set of keys changes.
    """
    if len(faces) == 1 and faces[0].queries is None and faces[0].log_weight is None:
        return tuple(Region(r.queries, faces[0].identities, text=r.text) for r in texts)
    member_Q = torch.zeros(num_queries, dtype=torch.int64)
    for number, region in enumerate(texts):
        member_Q[_positions(region, num_queries)] = number
    return tuple(part for face in faces for part in _split(face, texts, member_Q))


def _positions(region: Region, num_queries: int) -> Tensor:
    return torch.arange(num_queries) if region.queries is None else region.queries.cpu()


def _split(face: Region, texts: tuple[Region, ...], member_Q: Tensor) -> list[Region]:
    positions = _positions(face, len(member_Q))
    member = member_Q[positions]
    parts = []
    for number in torch.unique(member):
        rows = (member == number).nonzero()[:, 0]
        log_weight = None if face.log_weight is None else face.log_weight[rows.to(face.log_weight.device)]
        parts.append(Region(positions[rows], face.identities, log_weight, texts[int(number)].text))
    return parts


def sampled_mask(masks_IHW: Tensor, background: GuidanceBackground) -> Tensor:
    """Noise mask `[1, H, W]` in [0, 1]: 1 where the sampler may change the latent. All ones unless `freeze`."""
    check_background(background)
    if background != "freeze":
        return torch.ones_like(masks_IHW[:1], dtype=torch.float32)
    return masks_IHW.float().amax(0, keepdim=True).clamp(0.0, 1.0)
