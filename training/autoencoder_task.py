"""Learn an autoencoder in TAESD's layout from nothing: small latents that a small UNet can be trained on.

Needed only where no ready VAE fits, as for the miniature. Reconstruction is L1 of pixels and of their differences to
the neighbours (edges); the latents are held near zero mean and unit variance per channel and get a little noise before
decoding, so that a denoiser's small errors stay small in the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from attention.files import write_atomic
from attention.grid import LATENT_SCALE

from .base import BaseModel, is_tiny
from .base_files import vae_to_taesd
from .config import TrainConfig, without_chance
from .data import PictureDraw, Sample, latent_noise
from .pictures import side_by_side
from .randomness import generator, whole
from .source import Source
from .task import RunFacts
from .validation import EPOCH, chosen

FILE_NAME = "vae.safetensors"


class Autoencoder(nn.Module):
    """Encoder and decoder as one forward pass."""

    def __init__(self, vae: Any, noise: float) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(True)
        self.noise = noise

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, H, W]` in [-1, 1], noise `[B, 4, h, w]` -> (reconstruction, latents)."""
        latents = self.vae.encode(pixels).latents
        return self.vae.decode(latents + self.noise * noise.to(latents)).sample, latents


class CroppedDraw(PictureDraw):
    """Random squares of `autoencoder.crop` pixels: a convolutional autoencoder needs no more, and takes more steps."""

    def __call__(self, source: Source, index: int, epoch: int) -> Sample:
        """As `PictureDraw`, with `pixels` `[3, crop, crop]` and `vae_noise` to match."""
        sample = super().__call__(source, index, epoch)
        side = self.config.autoencoder.crop
        if side is None or side >= self.config.data.resolution:
            return sample
        gen = generator(self.config.seed, epoch, sample["key"], "crop")
        top, left = (whole(gen, self.config.data.resolution - side + 1) for _ in range(2))
        pixels = sample["pixels"][:, top : top + side, left : left + side]
        return {**sample, "pixels": pixels, "vae_noise": latent_noise(side // LATENT_SCALE, gen)}


class AutoencoderTask:
    """Trains the VAE of a base folder; everything else is carried along untouched."""

    def __init__(self, config: TrainConfig, base: BaseModel) -> None:
        if not is_tiny(base.vae):
            raise ValueError(
                f"model.base: the VAE of {base.name} is a {type(base.vae).__name__}; method=autoencoder trains "
                "AutoencoderTiny (TAESD's layout). Make a base with python -m training.new_base"
            )
        self.config = config
        self.base = base
        self.model = Autoencoder(base.vae, config.autoencoder.noise)
        self.draw = CroppedDraw(config)
        self.score_draw = PictureDraw(without_chance(config))

    def to_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Everything that is needed is trained, so it stays fp32."""
        self.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """All weights of the VAE."""
        return list(self.model.named_parameters())

    def losses(self, model: nn.Module, batch: Sample) -> Tensor:
        """L1 of pixels and edges per sample, plus the latents' distance from unit Gaussians over the batch; `[B]`."""
        options, pixels = self.config.autoencoder, batch["pixels"]
        made, latents = model(pixels, batch["vae_noise"])
        made, latents = made.float(), latents.float()
        error = (made - pixels).abs().flatten(1).mean(1)
        return error + options.edges * edge_error(made, pixels) + options.latents * away_from_unit(latents)

    def enable_checkpointing(self) -> None:
        """Recompute the blocks in the backward pass."""
        self.base.vae.enable_gradient_checkpointing()

    def compile(self) -> None:
        """Compile the whole autoencoder."""
        self.model.compile()

    def load(self, path: Path) -> None:
        """Start from a base folder's VAE."""
        from diffusers import AutoencoderTiny

        self.base.vae.load_state_dict(AutoencoderTiny.from_pretrained(path / "vae").state_dict())

    def save(self, folder: Path, weights: Mapping[str, Tensor], facts: RunFacts) -> Path:
        """Writes `base/`, the base folder with the trained VAE, and `vae.safetensors` for ComfyUI's VAELoader."""
        self.base.vae.load_state_dict({name.removeprefix("vae."): weight for name, weight in weights.items()})
        self.base.pipeline.save_pretrained(folder / "base")
        path = folder / FILE_NAME
        write_atomic(path, vae_to_taesd(self.base.vae.state_dict()), {"format": "pt", **facts.metadata})
        return path

    @torch.no_grad()
    def pictures(self, source: Source, path: Path) -> dict[str, float]:
        """Validation pictures beside their reconstructions; returns the mean PSNR in dB."""
        pairs = []
        for index in chosen(len(source), self.config.validation.pictures, self.config.seed):
            pixels = self.score_draw(source, index, EPOCH)["pixels"][None]
            made = self.base.vae.decode(self.base.vae.encode(pixels.to(self.base.vae.device)).latents).sample
            pairs.append((to_uint8(pixels[0]), to_uint8(made[0].cpu())))
        if not pairs:
            return {}
        path.parent.mkdir(parents=True, exist_ok=True)
        side_by_side(pairs).save(path)
        errors = [np.square(a.astype(np.float64) - b).mean() for a, b in pairs]
        return {"psnr": float(np.mean([10 * np.log10(255**2 / max(error, 1e-9)) for error in errors]))}


def edge_error(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, `[B]`."""
    difference = made - wanted
    down, right = difference.diff(dim=2).abs(), difference.diff(dim=3).abs()
    return down.flatten(1).mean(1) + right.flatten(1).mean(1)


def away_from_unit(latents: Tensor) -> Tensor:
    """How far a batch of latents is from zero mean and unit variance per channel; one number, 0 at best."""
    by_channel = latents.transpose(0, 1).flatten(1)
    return by_channel.mean(1).square().mean() + (by_channel.std(1) - 1).square().mean()


def to_uint8(pixels: Tensor) -> np.ndarray:
    """`[3, H, W]` in [-1, 1] -> uint8 `[H, W, 3]`."""
    picture = (pixels.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy()
    return np.asarray(Image.fromarray(picture))
