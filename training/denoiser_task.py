"""Learn a whole UNet from nothing, with its text or, under a text encoder that says nothing, unconditionally.

This is how the miniature's base comes about; for real work start from a published SD1.5 or SDXL checkpoint instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from attention.files import write_atomic

from .augment import pick
from .bands import apart, install_bands, side_by_side
from .base import BaseModel, is_tiny
from .base_files import comfy_checkpoint
from .compiled import compile_blocks
from .config import TrainConfig, without_chance
from .data import PictureDraw, Sample
from .draw import DrawOptions, draw
from .latents import LatentStore
from .randomness import generator
from .source import Source
from .task import RunFacts
from .text import context_for
from .thumbnails import thumbnail_tokens
from .unet import TextContext

FILE_NAME = "checkpoint.safetensors"
COLUMNS = 8


class DenoiserTask:
    """Frozen VAE and text encoders around a UNet that learns."""

    def __init__(self, config: TrainConfig, base: BaseModel) -> None:
        self.config = config
        self.base = base
        self.model: nn.Module = base.unet.requires_grad_(True)
        if max(config.denoiser.people) > 1:
            install_bands(base.unet)
        self.draw = PictureDraw(config)
        self.score_draw = PictureDraw(without_chance(config))
        self.noise = DDPMScheduler.from_config(base.pipeline.scheduler.config)
        self._latents = LatentStore(base, config.data)

    def to_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """The UNet learns and stays fp32; the VAE would overflow in fp16 and stays too."""
        self.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.base.prompts.to(device, dtype)
        self.base.vae.to(device)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """All weights of the UNet."""
        return list(self.model.named_parameters())

    def losses(self, model: nn.Module, batch: Sample) -> Tensor:
        """Mean squared error of the prediction per sample, `[B]`."""
        people = self._people(batch)
        noise, timesteps = side_by_side(batch["noise"], people), batch["timestep"][::people]
        latents = side_by_side(self._latents(batch), people)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        context = self._context(batch)
        prediction = model(
            noisy,
            timesteps,
            encoder_hidden_states=context.tokens,
            added_cond_kwargs=context.added(),
            return_dict=False,
        )[0]
        wanted = noise
        if self.noise.config.prediction_type == "v_prediction":
            wanted = self.noise.get_velocity(latents, noise, timesteps)
        return apart((prediction.float() - wanted.float()).square(), people).flatten(1).mean(1)

    def _people(self, batch: Sample) -> int:
        """How many people this step puts into a picture: drawn from its first sample, so that resuming is exact."""
        choices = [people for people in self.config.denoiser.people if len(batch["key"]) % people == 0]
        return pick(choices or [1], generator(self.config.seed, batch["epoch"][0], batch["key"][0], "people"))

    def _context(self, batch: Sample) -> TextContext:
        if self.config.denoiser.condition == "thumbnail":
            width = self.base.unet.config["cross_attention_dim"]
            return TextContext(thumbnail_tokens(batch["pixels"], batch["thumbnail_side"], width))
        tokens, pooled = self.base.prompts(batch["caption"])
        return context_for(tokens, pooled, batch["original_size"], self.config.data.resolution)

    def enable_checkpointing(self) -> None:
        """Recompute the UNet's blocks in the backward pass."""
        self.base.unet.enable_gradient_checkpointing()

    def compile(self) -> None:
        """Compile the transformer blocks."""
        compile_blocks(self.base.unet)

    def load(self, path: Path) -> None:
        """Start from another base folder's UNet."""
        from diffusers import UNet2DConditionModel

        self.base.unet.load_state_dict(UNet2DConditionModel.from_pretrained(path / "unet").state_dict())

    def save(self, folder: Path, weights: Mapping[str, Tensor], facts: RunFacts) -> Path:
        """Writes `base/`, a diffusers folder, and `checkpoint.safetensors`, the same for ComfyUI's loader (fp16).

        Returns the checkpoint, or the folder where the VAE is no AutoencoderTiny: its own file goes with the UNet then.
        """
        unet = self.base.unet
        unet.load_state_dict(weights)
        self.base.prompts.float()  # the run may have used less
        self.base.pipeline.save_pretrained(folder / "base")
        if not is_tiny(self.base.vae):
            return folder / "base"
        metadata = {"format": "pt", "fusedid.license": self.config.model.license, **facts.metadata}
        write_atomic(folder / FILE_NAME, comfy_checkpoint(unet, self.base.vae), metadata)
        return folder / FILE_NAME

    def pictures(self, source: Source, path: Path) -> dict[str, float]:
        """Pictures of nobody, from fixed seeds; no score."""
        count = self.config.validation.pictures
        side = self.config.data.resolution
        options = DrawOptions(
            width=side, height=side, steps=self.config.validation.picture_steps, guidance_scale=1.0, count=count
        )
        if count:
            path.parent.mkdir(parents=True, exist_ok=True)
            tiled([np.asarray(picture) for picture in draw(self.base, None, [], options)]).save(path)
        return {}


def tiled(pictures: list[np.ndarray]) -> Image.Image:
    """Equal pictures in rows of eight."""
    rows = [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
    blank = np.zeros_like(pictures[0])
    full = [np.concatenate(row + [blank] * (len(rows[0]) - len(row)), axis=1) for row in rows]
    return Image.fromarray(np.concatenate(full, axis=0))
