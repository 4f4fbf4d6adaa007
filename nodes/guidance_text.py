"""A prompt in CLIP's joint space, from ComfyUI's CLIP (METHOD 2.1)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .remember import Remembered

log = logging.getLogger("fusedid")

WHERE = (
    "Load a CLIP-L text encoder that has its text_projection (such as clip_l.safetensors of the SD3 or Flux text "
    "encoders) with CLIPLoader and connect that; an SD1.5 checkpoint does not carry the projection"
)
LARGEST_PLAUSIBLE = 8.0


@dataclass(frozen=True, eq=False)
class TextChunk:
    """At most 77 tokens of a prompt.

    embedding: `[1, W]`, projected into the joint space. hidden: `[1, N, W]`, last layer after its norm. mask: `[1, N]`,
    true up to the end token.
    """

    embedding: Tensor
    hidden: Tensor
    mask: Tensor


_texts: Remembered[list[TextChunk]] = Remembered(32)


def remembered_text(clip: Any, text: str) -> list[TextChunk]:
    """`encode_text`, computed once for all nodes that read the same text with the same CLIP."""
    return _texts.get(clip, text, lambda: encode_text(clip, text))


def encode_text(clip: Any, text: str) -> list[TextChunk]:
    """The prompt's chunks in the joint space of CLIP ViT-L/14, on the CPU in fp32. Weights in brackets do not count.

    Raises ValueError when the text encoder is no CLIP-L or has no usable `text_projection`.
    """
    encoder = getattr(clip.cond_stage_model, "clip_l", None)
    if encoder is None:
        raise ValueError(
            f"this text encoder ({type(clip.cond_stage_model).__name__}) has no CLIP-L part, and the text branch works "
            f"in the space of CLIP ViT-L/14. {WHERE}"
        )
    check_projection(encoder.transformer.text_projection.weight, encoder.parameters())
    chunks = clip.tokenize(text)["l"]
    if len(chunks) > 1:
        log.warning(
            "HybridGuidance: the text is longer than the 77 tokens CLIP reads at once; it is encoded in %d parts whose "
            "embeddings are averaged", len(chunks)
        )  # fmt: skip
    clip.load_model()
    options = (encoder.layer, encoder.layer_idx, encoder.return_projected_pooled)
    try:
        encoder.layer, encoder.layer_idx, encoder.return_projected_pooled = "last", None, True
        return [_encode_chunk(encoder, chunk) for chunk in chunks]
    finally:
        encoder.layer, encoder.layer_idx, encoder.return_projected_pooled = options


def _encode_chunk(encoder: Any, chunk: list[tuple[Any, ...]]) -> TextChunk:
    unweighted = [(token[0], 1.0) for token in chunk]
    hidden, pooled = encoder.encode_token_weights([unweighted])[:2]
    end = encoder.special_tokens["end"]
    last = next((i for i, (token, _) in enumerate(unweighted) if isinstance(token, int) and token == end), None)
    count = hidden.shape[1] if last is None else last + 1
    mask = (torch.arange(hidden.shape[1]) < count)[None]
    return TextChunk(pooled.float().cpu(), hidden.float().cpu(), mask)


def check_projection(weight: Tensor, others: Any) -> None:
    """Raises ValueError unless this can be a trained text projection `[W, W]`.

    A checkpoint without the projection leaves the host's parameter as uninitialised memory, which nothing announces.
    Memory is told from weights by what it holds: zeros, numbers of absurd size, or another layer's weights.
    """
    w = weight.detach().float().cpu()
    reason = _implausible(w) or _recycled(w, others, weight)
    if reason:
        raise ValueError(
            f"this CLIP has no text_projection ({reason}), so the text would enter the wrong space. {WHERE}"
        )


def _implausible(w: Tensor) -> str | None:
    if not bool(torch.isfinite(w).all()) or float(w.abs().max()) > LARGEST_PLAUSIBLE:
        return "its place holds numbers no weight has"
    if float((w.abs() < 1e-9).float().mean()) > 0.01 or not bool(w.abs().amax(1).min() > 1e-5):
        return "its place is empty"
    if torch.equal(w, torch.eye(*w.shape)):
        return "its place holds the identity"
    return None


def _recycled(w: Tensor, others: Any, own: Tensor) -> str | None:
    probe = w[:: max(1, len(w) // 4)]
    for other in others:
        if other is own or other.ndim != 2 or other.shape[1] != w.shape[1]:
            continue
        rows = other.detach()[: len(w)].float().cpu()
        if rows.shape == w.shape and torch.equal(rows[:: max(1, len(w) // 4)], probe):
            return "its place holds another layer's weights"
    return None
