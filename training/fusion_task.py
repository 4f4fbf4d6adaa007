"""METHOD 1.5: learn W_kf and W_vf by predicting the noise of a picture whose face is given as a reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from attention.adapter import AdapterSettings, Projection, load_adapter, save_adapter

from .base import BaseModel
from .compiled import compile_blocks
from .config import TrainConfig, without_chance
from .data import FusionDraw, Sample
from .latents import LatentStore
from .pictures import draw_validation
from .source import Source
from .task import RunFacts
from .text import context_for
from .unet import FusedUNet, Reference, TextContext
from .unet_sites import layers_per_block

FILE_NAME = "adapter.safetensors"


class FusionTask:
    """Frozen VAE and text encoders around a `FusedUNet`."""

    def __init__(self, config: TrainConfig, base: BaseModel) -> None:
        self.config = config
        self.base = base
        self.model = FusedUNet(base.unet, adapter_settings(config, base))
        self.draw = FusionDraw(config)
        self.score_draw = FusionDraw(without_chance(config))
        self.noise = DDPMScheduler.from_config(base.pipeline.scheduler.config)
        self._latents = LatentStore(base, config.data)
        self._hidden: dict[tuple, dict[str, Tensor]] = {}
        self._empty: tuple[Tensor, Tensor | None] | None = None

    def to_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Frozen weights to `dtype`, except the VAE, which overflows in fp16."""
        self.model.to(device)
        nn.Module.to(self.model.unet, dtype=dtype)  # diffusers' own `to` warns although nothing is wrong
        self.base.prompts.to(device, dtype)
        self.base.vae.to(device)
        tokens, pooled = self.base.prompts([""])
        self._empty = tokens.float(), None if pooled is None else pooled.float()

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """`to_k_face` and `to_v_face` of every site."""
        return self.model.trainable()

    def losses(self, model: nn.Module, batch: Sample) -> Tensor:
        """Mean squared error of the prediction per sample, `[B]` (eps, or v where the base model predicts v)."""
        noise, timesteps = batch["noise"], batch["timestep"]
        latents = self._latents(batch)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        context = self._context(batch["caption"], batch["original_size"])
        rows = torch.tensor([i for i, has in enumerate(batch["has_face"]) if has], dtype=torch.long)
        references = [self._reference(batch, rows, context)] if len(rows) else []
        prediction = model(noisy, timesteps, context, references, rows=rows)
        wanted = noise
        if self.noise.config.prediction_type == "v_prediction":
            wanted = self.noise.get_velocity(latents, noise, timesteps)
        return (prediction.float() - wanted.float()).square().flatten(1).mean(1)

    def _context(self, captions: list[str], sizes: list[tuple[int, int]]) -> TextContext:
        tokens, pooled = self.base.prompts(captions)
        return context_for(tokens, pooled, sizes, self.config.data.resolution)

    def _reference(self, batch: Sample, rows: Tensor, context: TextContext) -> Reference:
        if self.config.reference.remember:
            return self._remembered(batch, rows)
        latents = self._latents(batch, "reference_", rows)
        size, on = self.config.reference.size, latents.device
        if self.config.reference.text == "positive":
            at = rows.to(on)
            pooled = None if context.pooled is None else context.pooled[at]
            text = context_for(context.tokens[at], pooled, [(size, size)] * len(rows), size)
        else:
            assert self._empty is not None, "to_device comes first"
            text = context_for(*self._empty, [(size, size)], size)
        if self.config.reference.timestep == "clean":
            return Reference(latents, text)
        timesteps = batch["timestep"][rows.to(on)]
        noisy = self.noise.add_noise(latents, batch["reference_noise"][rows.to(on)], timesteps)
        return Reference(noisy, text, timesteps)

    def _remembered(self, batch: Sample, rows: Tensor) -> Reference:
        """The clean pass of these rows, each picture's run once in the whole training."""
        ids = [batch["reference_id"][i] for i in rows.tolist()]
        missing = torch.tensor([i for i, name in zip(rows.tolist(), ids) if name not in self._hidden])
        latents = self._latents(batch, "reference_", rows)
        if len(missing):
            size = self.config.reference.size
            assert self._empty is not None, "to_device comes first"
            tokens, pooled = self._empty
            kind = self.model.unet.dtype
            pooled = None if pooled is None else pooled.to(kind)
            context = context_for(tokens.to(kind), pooled, [(size, size)], size)
            fresh = self._latents(batch, "reference_", missing).to(self.model.unet.dtype)
            hidden = self.model.reference_hidden(Reference(fresh, context))
            for row, i in enumerate(missing.tolist()):
                self._hidden[batch["reference_id"][i]] = {path: h[row].to("cpu") for path, h in hidden.items()}
        known = {
            path: torch.stack([self._hidden[name][path] for name in ids]).to(latents.device)
            for path in self._hidden[ids[0]]
        }
        return Reference(latents, TextContext(latents), hidden=known)

    def enable_checkpointing(self) -> None:
        """Recompute the UNet's blocks in the backward pass."""
        self.model.unet.enable_gradient_checkpointing()

    def compile(self) -> None:
        """Compile the transformer blocks."""
        compile_blocks(self.model.unet)

    def load(self, path: Path) -> None:
        """Start from an adapter file."""
        settings = self.model.settings
        self.model.load_adapter(load_adapter(path), name=path.name)
        self.model.settings = settings

    def save(self, folder: Path, weights: Mapping[str, Tensor], facts: RunFacts) -> Path:
        """Writes `adapter.safetensors`, fp16, with the empty prompt that the reference pass was trained with."""
        assert self._empty is not None, "to_device comes first"
        tokens, pooled = self._empty
        settings = adapter_settings(
            self.config,
            self.base,
            samples_seen=facts.samples_seen,
            base_hash=facts.base_hash,
            encoder=facts.encoder,
        )
        path = folder / FILE_NAME
        save_adapter(
            path,
            self._projections(weights),
            settings,
            prompt_context=tokens[0] if settings.text == "empty" else None,
            prompt_pooled=None if pooled is None or settings.text != "empty" else pooled[0],
            extra_metadata={**facts.metadata, "fusedid.layers_per_block": str(layers_per_block(self.model.unet))},
        )
        return path

    def _projections(self, weights: Mapping[str, Tensor]) -> dict[str, Projection]:
        prefixes = {entry.path: self.model.weight_prefix(entry.path) for entry in self.model.site_table}
        return {
            path: Projection(weights[f"{prefix}to_k_face.weight"], weights[f"{prefix}to_v_face.weight"])
            for path, prefix in prefixes.items()
        }

    def pictures(self, source: Source, path: Path) -> dict[str, float]:
        """Pictures of validation people beside their references, with the identity score."""
        return draw_validation(self.base, self.model, source, self.config, path)


def adapter_settings(
    config: TrainConfig, base: BaseModel, *, samples_seen: int = 0, base_hash: str = "", encoder: str = ""
) -> AdapterSettings:
    """METHOD's decisions, as this run makes them."""
    return AdapterSettings(
        base=base.family,
        timestep=config.reference.timestep,
        text=config.reference.text,
        length=config.reference.length,
        combine=config.reference.combine,
        reference_size=config.reference.size,
        base_checkpoint=base.name,
        base_hash=base_hash,
        encoder=encoder,
        samples_seen=samples_seen,
        license=config.model.license,
    )
