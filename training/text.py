"""Prompts to UNet context, for SD1.5/SD2 (one CLIP) and SDXL (two). Legend: B prompts, T tokens, D_c context width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .unet import TextContext


class PromptEncoder(nn.Module):
    """The frozen text encoders of a base model.

    parts: (tokenizer, encoder) pairs. One: its last hidden state. Two (SDXL): the penultimate hidden states side by
    side, and the pooled projection of the second.
    """

    def __init__(self, parts: Sequence[tuple[Any, Any]]) -> None:
        super().__init__()
        self.tokenizers = [tokenizer for tokenizer, _ in parts]
        self.encoders = nn.ModuleList([encoder.requires_grad_(False).eval() for _, encoder in parts])

    @property
    def pools(self) -> bool:
        """Whether the model wants pooled text and time ids (SDXL)."""
        return len(self.tokenizers) > 1

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Prompts -> (tokens `[B, T, D_c]`, pooled `[B, P]` or None), on the encoders' device."""
        distinct = sorted(set(prompts))
        tokens, pooled = self._encode(distinct)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=tokens.device)
        return tokens[rows], None if pooled is None else pooled[rows]

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        if not self.pools:
            return self._run(0, prompts).last_hidden_state, None
        outputs = [self._run(i, prompts, output_hidden_states=True) for i in range(len(self.tokenizers))]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds

    def _run(self, which: int, prompts: list[str], **options: bool) -> Any:
        tokenizer, encoder = self.tokenizers[which], self.encoders[which]
        padding = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        ids = tokenizer(prompts, return_tensors="pt", **padding).input_ids
        return encoder(ids.to(next(encoder.parameters()).device), **options)


def time_ids(original_sizes: Sequence[tuple[int, int]], size: int, device: torch.device | str = "cpu") -> Tensor:
    """SDXL's size condition `[B, 6]`: original height and width, crop at (0, 0), target height and width in pixels."""
    rows = [[height, width, 0, 0, size, size] for height, width in original_sizes]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def context_for(
    tokens: Tensor, pooled: Tensor | None, original_sizes: Sequence[tuple[int, int]], size: int
) -> TextContext:
    """The context of rows of `size` pixels; time ids only where the model wants them."""
    if pooled is None:
        return TextContext(tokens)
    return TextContext(tokens, pooled, time_ids(original_sizes, size, tokens.device))
