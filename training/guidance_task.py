"""METHOD 2.5: learn the Linear, and the UNet to follow it, by reconstructing pictures of people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from attention.files import write_atomic
from attention.guidance import Guidance, prepare_face, prepare_style
from attention.guidance_file import load_guidance, save_guidance
from attention.guidance_settings import GuidanceSettings, Tower, prior_for
from attention.sites import family_of

from .base import BaseModel
from .compiled import compile_blocks
from .config import TrainConfig, without_chance
from .data import Sample
from .guidance_data import GuidanceDraw
from .guidance_model import GuidanceModel, lora_tensors
from .guidance_pictures import draw_guidance
from .latents import LatentStore
from .source import Source
from .task import RunFacts
from .text import context_for
from .unet_naming import unet_to_ldm
from .unet_sites import UNet, layers_per_block, unet_sites
from .validation import chosen
from .vision import VisionTowers

FILE_NAME = "guidance.safetensors"
NUM_SIZES = 6  # of SDXL's time ids


class GuidanceTask:
    """Frozen VAE and CLIP towers around a `GuidanceModel`."""

    def __init__(self, config: TrainConfig, base: BaseModel, source: Source) -> None:
        self.config = config
        self.base = base
        self.settings = guidance_settings(config, base, source)
        lora = config.guidance.lora if config.guidance.train == "lora" else None
        self.model = GuidanceModel(base.unet, self.settings, lora=lora)
        towers = config.guidance.reads_style and not config.guidance.cached
        self.towers = VisionTowers(config.guidance.towers) if towers else None
        self.draw = GuidanceDraw(config, self.settings.face_width)
        self.score_draw = GuidanceDraw(without_chance(config), self.settings.face_width)
        self.noise = DDPMScheduler.from_config(base.pipeline.scheduler.config)
        self._latents = LatentStore(base, config.data)
        self._pooled_width = pooled_width(base.unet)

    def to_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Trained weights stay fp32; with a LoRA the UNet beneath it takes `dtype`. No text encoder is needed."""
        self.model.to(device)
        if self.model.lora is not None:
            for weight in self.model.unet.parameters():
                if not weight.requires_grad:
                    weight.data = weight.data.to(dtype)
        self.base.vae.to(device)
        if self.towers is not None:
            self.towers.to(device)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The Linear, and the UNet or its LoRA."""
        return self.model.trainable()

    def losses(self, model: nn.Module, batch: Sample) -> Tensor:
        """Mean squared error of the prediction per sample `[B]`."""
        noise, timesteps = batch["noise"], batch["timestep"]
        latents = self._latents(batch)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        style, face = self.embeddings(batch)
        prediction = model(noisy, timesteps, style, face, self.added(batch["original_size"]))
        wanted = noise
        if self.noise.config.prediction_type == "v_prediction":
            wanted = self.noise.get_velocity(latents, noise, timesteps)
        return (prediction.float() - wanted.float()).square().flatten(1).mean(1)

    def embeddings(self, batch: Sample) -> tuple[Tensor, Tensor]:
        """Style `[B, S]` and face `[B, D]` as the Linear wants them; what is dropped is zero (METHOD 2.1)."""
        face = prepare_face(batch["face"], self.settings.face_normalisation)
        if not self.config.guidance.reads_style:
            return face.new_zeros(len(face), self.settings.style_width), face
        raw = batch["style"] if self.towers is None else self.towers(batch["style_pixels"])
        style = prepare_style(raw, self.settings.towers, self.settings.style_normalisation)
        keep = torch.tensor(batch["keeps_style"], device=style.device)
        return style * keep[:, None], face

    def added(self, sizes: list[tuple[int, int]]) -> dict[str, Tensor] | None:
        """SDXL's further conditions: a pooled text of zeros, as the node sends it, and the sizes."""
        if self._pooled_width is None:
            return None
        pooled = torch.zeros(len(sizes), self._pooled_width, device=self.model.unet.device)
        return context_for(pooled, pooled, sizes, self.config.data.resolution).added()

    def enable_checkpointing(self) -> None:
        """Recompute the UNet's blocks in the backward pass."""
        self.model.unet.enable_gradient_checkpointing()

    def compile(self) -> None:
        """Compile the transformer blocks."""
        compile_blocks(self.model.unet)

    def load(self, path: Path) -> None:
        """Start the Linear from a guidance file. Raises ValueError when its columns mean something else."""
        loaded = load_guidance(path)
        ours, theirs = (
            (g.towers, g.face_width, g.context_width, g.num_tokens) for g in (self.settings, loaded.settings)
        )
        if ours != theirs:
            raise ValueError(
                f"checkpoint.init_from: {path.name} was made for (towers, face width, context, tokens) {theirs}, "
                f"this run has {ours}. Choose a file with the same ones"
            )
        self.model.guidance.load_state_dict(loaded.state_dict())

    def save(self, folder: Path, weights: Mapping[str, Tensor], facts: RunFacts) -> Path:
        """Writes `guidance.safetensors` and, beside it, `guidance_unet.safetensors` or `guidance_lora.safetensors`."""
        settings = replace(
            self.settings,
            base_hash=facts.base_hash,
            samples_seen=facts.samples_seen,
            face_encoder=facts.encoder,
        )
        guidance = Guidance(settings)
        prefix = "guidance."
        guidance.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})
        if not self.config.guidance.reads_style:  # what no style ever trained would be noise under one
            guidance.linear.weight.data[:, : settings.style_width] = 0
        path = folder / FILE_NAME
        save_guidance(path, guidance, extra_metadata=facts.metadata)
        metadata = {"format": "pt", "fusedid.license": settings.license, **facts.metadata}
        if self.model.lora is not None:
            tensors = {name: t.half() for name, t in lora_tensors(weights, self.model.lora).items()}
            write_atomic(folder / "guidance_lora.safetensors", tensors, metadata)
        else:
            unet = {name.removeprefix("unet."): w.half() for name, w in weights.items() if name.startswith("unet.")}
            named = unet_to_ldm(unet, layers_per_block(self.model.unet))
            write_atomic(folder / "guidance_unet.safetensors", named, metadata)
        return path

    @torch.no_grad()
    def pictures(self, source: Source, path: Path) -> dict[str, float]:
        """Reconstructions from each validation picture's own style and face, beside the original."""
        indices = chosen(len(source), self.config.validation.pictures, self.config.seed)
        return draw_guidance(self, source, indices, path)


def guidance_settings(config: TrainConfig, base: BaseModel, source: Source) -> GuidanceSettings:
    """METHOD 2's decisions, as this run makes them."""
    sites = [entry.site for entry in unet_sites(base.unet)]
    options = config.guidance
    towers = tuple(Tower(tower.name, tower.width) for tower in options.towers)
    return GuidanceSettings(
        base=family_of(sites),
        towers=towers,
        face_width=face_width(source),
        face_encoder=source.encoder,
        face_encoder_name=source.encoder_name,
        context_width=sites[0].context,
        num_tokens=options.tokens,
        face_normalisation=options.face_normalisation,
        style_normalisation=options.style_normalisation,
        prior=prior_for(towers),
        base_checkpoint=base.name,
        license=config.model.license,
    )


def pooled_width(unet: UNet) -> int | None:
    """Width of SDXL's pooled text; None for models that take none."""
    if unet.config.get("addition_embed_type") != "text_time":
        return None
    return (
        int(unet.config["projection_class_embeddings_input_dim"]) - NUM_SIZES * unet.config["addition_time_embed_dim"]
    )


def face_width(source: Source) -> int:
    """Numbers per face embedding. Raises ValueError when no picture has a face."""
    for index in range(len(source)):
        embedding = source.record(index).embedding
        if embedding is not None:
            return int(np.asarray(embedding).size)
    raise ValueError(
        "no picture of the data set has a face embedding, so there is no identity to learn; prepare it with a face pack"
    )
