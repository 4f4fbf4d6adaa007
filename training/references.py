"""Face crops to what the reference pass takes: latents, text and weight of every reference (METHOD 1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention.fusion import reference_weights

from .augment import square, to_rgb_pm1
from .base import BaseModel
from .randomness import generator
from .text import context_for
from .unet import FusedUNet, Reference, TextContext


@dataclass(frozen=True, eq=False)
class Person:
    """Square face crops of one person (uint8 `[S, S, 3]`), a weight for each, and where the person goes.

    mask: float `[H, W]` in [0, 1], any size; None when nobody is routed.
    """

    crops: tuple[np.ndarray, ...]
    weights: tuple[float, ...] = ()
    mask: np.ndarray | None = None


ReferenceText = tuple[Tensor | None, Tensor | None] | None
"""Tokens `[T, D_c]` and pooled text `[P]` of the reference pass, as an adapter file holds them; None encodes ''."""


def make_references(
    base: BaseModel, model: FusedUNet, people: Sequence[Person], prompt: str, reference_text: ReferenceText = None
) -> list[Reference]:
    """Every crop of every person as the reference pass takes it: its VAE mean at the adapter's reference size.

    prompt: the picture's; read by adapters whose reference pass was trained with it.
    """
    size = model.settings.reference_size
    context = _reference_context(base, model, prompt, reference_text, size)
    found = []
    for identity, person in enumerate(people):
        weights = person.weights or (1.0,) * len(person.crops)
        shown = [(crop, weight) for crop, weight in zip(person.crops, weights) if weight > 0]
        for (crop, _), weight in zip(shown, reference_weights([weight for _, weight in shown]) if shown else ()):
            pixels = to_rgb_pm1(square(crop, size))[None].to(base.vae.device)
            latents = base.encode(pixels).to(model.unet.dtype)
            found.append(Reference(latents, context, identity=identity, weight=weight))
    return found


def stack_references(rows: Sequence[Sequence[Reference]]) -> list[Reference]:
    """References of several pictures as one list whose tensors have one row per picture.

    Raises ValueError when the pictures differ in their people, or in the number or weights of their references.
    """
    kinds = {tuple((one.identity, round(one.weight, 6)) for one in row) for row in rows}
    if len(kinds) > 1:
        raise ValueError(
            "pictures drawn together need the same number of people, references and weights; draw the others in a "
            "batch of their own"
        )
    return [_stacked(same) for same in zip(*rows)]


def noised(reference: Reference, noise: Any, timestep: int) -> Reference:
    """The reference at the noise level of a step; its noise never changes (METHOD 1.2 `matched`)."""
    one = (1, *reference.latents.shape[1:])
    drawn = torch.randn(one, generator=generator("reference", reference.identity)).expand(reference.latents.shape)
    at = torch.full((len(drawn),), timestep, dtype=torch.long, device=reference.latents.device)
    latents = noise.add_noise(reference.latents, drawn.to(reference.latents), at)
    return replace(reference, latents=latents, timesteps=at)


def _stacked(same: Sequence[Reference]) -> Reference:
    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        known = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(known) if known else None

    tokens, pooled, time_ids = (
        joined([getattr(one.context, name) for one in same]) for name in ("tokens", "pooled", "time_ids")
    )
    assert tokens is not None
    latents = torch.cat([one.latents for one in same])
    return replace(same[0], latents=latents, context=TextContext(tokens, pooled, time_ids))


def _reference_context(
    base: BaseModel, model: FusedUNet, prompt: str, reference_text: ReferenceText, size: int
) -> TextContext:
    if model.settings.text == "positive":
        tokens, pooled = base.prompts([prompt])
    elif reference_text is not None:
        tokens, pooled = (None if t is None else t[None].to(model.unet.device) for t in reference_text)
    else:
        tokens, pooled = base.prompts([""])
    assert tokens is not None
    kind = model.unet.dtype
    return context_for(tokens.to(kind), None if pooled is None else pooled.to(kind), [(size, size)], size)
