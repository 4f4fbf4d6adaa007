"""Several people side by side in one picture, each told apart in an upright band, while a base model is trained.

A base that saw one face per picture knows a token's place by the picture's edges. Two people need it to know the place
within their band, or nothing that is shown of a person could be put where it belongs (METHOD 1.4 routes by masks).
Legend: B rows, Q queries of a picture `h * w`, K context tokens, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from .unet_sites import UNet, unet_sites


def side_by_side(rows: Tensor, people: int) -> Tensor:
    """`[B, 4, h, w]` -> `[B // people, 4, h, people * w]`: neighbours in the batch become neighbours in a picture."""
    return torch.cat(list(rows.unflatten(0, (-1, people)).unbind(1)), dim=-1)


def apart(pictures: Tensor, people: int) -> Tensor:
    """The reverse of `side_by_side`."""
    return torch.stack(pictures.chunk(people, dim=-1), dim=1).flatten(0, 1)


class BandAttention(AttnProcessor2_0):
    """Cross-attention in which every band of a picture sees its own person's context."""

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[B, Q, C]` of square bands and context `[B * people, K, D_c]`, in the order of the bands."""
        assert encoder_hidden_states is not None, "cross-attention has a context"
        people = len(encoder_hidden_states) // len(hidden_states)
        if people == 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        side = math.isqrt(hidden_states.shape[1] // people)
        bands = _bands(hidden_states, side, people)
        out = super().__call__(attn, bands, encoder_hidden_states, attention_mask, temb)
        return out.unflatten(0, (-1, people)).unflatten(2, (side, side)).transpose(1, 2).flatten(1, 3)


def _bands(hidden: Tensor, side: int, people: int) -> Tensor:
    """`[B, side * people * side, C]` -> `[B * people, side * side, C]`."""
    return hidden.unflatten(1, (side, people, side)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def install_bands(unet: UNet) -> None:
    """Gives every site's cross-attention its bands."""
    for entry in unet_sites(unet):
        block: Any = unet.get_submodule(entry.name)
        block.attn2.set_processor(BandAttention())
