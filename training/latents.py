"""Latents of a batch's pictures: encoded, taken from prepare's cache, or remembered where augmentations repeat."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .base import BaseModel
from .config import DataConfig
from .data import Sample

ENCODE_AT_ONCE = 16


class LatentStore:
    """Scaled latents of targets and references (`data.latents`, `data.variants`)."""

    def __init__(self, base: BaseModel, data: DataConfig) -> None:
        self.base = base
        self.remembers = data.variants is not None and data.latents == "encode"
        self._known: dict[Hashable, Tensor] = {}

    def __call__(self, batch: Sample, prefix: str = "", rows: Tensor | None = None) -> Tensor:
        """`[B, 4, h, w]`, or those of `rows`, of the targets (prefix "") or of the references ("reference_").

        Targets are sampled with the batch's `vae_noise`, references are the mean. What is remembered is the mean: an
        autoencoder's own noise is far below what the eye sees, and encoding is what is to be saved.
        """
        noise = batch["vae_noise"] if prefix == "" else None
        if f"{prefix}moments" in batch:
            return self.base.from_moments(_at(batch[f"{prefix}moments"], rows), noise)
        pixels = _at(batch[f"{prefix}pixels"], rows)
        if not self.remembers:
            return self.base.encode(pixels, noise)
        ids = batch["reference_id" if prefix else "picture_id"]
        wanted = [(prefix, ids[i]) for i in (range(len(ids)) if rows is None else rows.tolist())]
        missing = [i for i, name in enumerate(wanted) if name not in self._known]
        for start in range(0, len(missing), ENCODE_AT_ONCE):
            part = missing[start : start + ENCODE_AT_ONCE]
            for i, latents in zip(part, self.base.encode(pixels[part])):
                self._known[wanted[i]] = latents.half().cpu()
        return torch.stack([self._known[name] for name in wanted]).to(pixels)


def _at(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows.to(values.device)]
