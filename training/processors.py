"""Attention processors for diffusers: record what a reference face looks like at a site, or attend to it there.

What to do travels in `cross_attention_kwargs["faces"]`, not in module state, so that gradient checkpointing recomputes
a block with exactly what the forward pass had. Legend: B rows, Q queries, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from attention.fusion import PAPER, FaceControls, FaceKeys, decoupled_attention, fused_attention, sdpa_attend
from attention.routing import Region


@dataclass(frozen=True, eq=False)
class Recording:
    """Collects the hidden states `[B, Q, C]` that enter `to_q` at every site (after norm2), by LDM path."""

    hidden: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FaceCall:
    """The faces of one UNet call.

    keys: LDM path -> references at that site, with 1 row or as many rows as see faces.
    rows: int64 indices of the batch rows that see faces; None means all of them. others: the remaining rows, found once
    per call (`other_rows`) and not once per layer, which would make the GPU wait.
    regions: LDM path -> who sees whom; None means every query sees every face.
    """

    keys: Mapping[str, Sequence[FaceKeys]]
    rows: Tensor | None = None
    others: Tensor | None = None
    regions: Mapping[str, tuple[Region, ...]] | None = None
    controls: FaceControls = PAPER
    combine: str = "fused"

    @property
    def active(self) -> bool:
        """Whether anything changes. At strength 0 the unpatched path runs, bit for bit (METHOD 1.1)."""
        return self.controls.strength > 0 and (self.rows is None or len(self.rows) > 0)


def other_rows(rows: Tensor, num: int) -> Tensor:
    """The rows of a batch of `num` that are not in `rows`, int64 in order, on the same device."""
    left = torch.ones(num, dtype=torch.bool, device=rows.device).index_fill(0, rows, False)
    return left.nonzero()[:, 0]


class SelfAttention(AttnProcessor2_0):
    """diffusers' own attention; it only tolerates the `faces` argument that is meant for the cross-attention."""

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        faces: FaceCall | Recording | None = None,
    ) -> Tensor:
        """As diffusers' `AttnProcessor2_0`."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class FaceCrossAttention(AttnProcessor2_0):
    """Cross-attention of one site over text and, when asked, face keys."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        faces: FaceCall | Recording | None = None,
    ) -> Tensor:
        """Records, fuses, or does what diffusers does. Shapes: hidden states `[B, Q, C]`, context `[B, T, D_c]`."""
        if isinstance(faces, Recording):
            self._record(faces, hidden_states)
        if not isinstance(faces, FaceCall) or not faces.active:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attention_mask is not None:
            raise ValueError("fused attention takes no text mask; pass the whole text context without a mask")
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out = self._attend(q, k, v, attn.heads, faces)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor

    # These two stay outside compiled code. What depends on the path would be compiled anew for every site, and after
    # the first eight of them torch gives up without an error.

    @torch.compiler.disable
    def _record(self, recording: Recording, hidden_states: Tensor) -> None:
        recording.hidden[self.path] = hidden_states

    @torch.compiler.disable
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, faces: FaceCall) -> Tensor:
        return _attend_rows(q, k, v, heads, faces, self.path)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, heads: int, faces: FaceCall, path: str) -> Tensor:
    """Fused attention for the rows that see faces, text attention for the others."""
    if faces.rows is None or len(faces.rows) == q.shape[0]:
        return _attend(q, k, v, heads, faces, path)
    assert faces.others is not None, "rows come with others"
    seeing, blind = faces.rows.to(q.device), faces.others.to(q.device)
    fused = _attend(q[seeing], k[seeing], v[seeing], heads, faces, path)
    plain = sdpa_attend(q[blind], k[blind], v[blind], heads)
    return torch.empty_like(q).index_copy(0, seeing, fused).index_copy(0, blind, plain)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, faces: FaceCall, path: str) -> Tensor:
    attention = fused_attention if faces.combine == "fused" else decoupled_attention
    regions = None if faces.regions is None else tuple(region.to(q.device) for region in faces.regions[path])
    return attention(q, k, v, faces.keys[path], heads=heads, regions=regions, controls=faces.controls)
