"""The base model: a diffusers folder or one `.safetensors` checkpoint, taken apart into what training needs."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention.files import foreign_family, read_header
from attention.sites import FAMILIES, family_of

from .config import ModelConfig
from .miniature import load_miniature
from .text import PromptEncoder
from .unet_sites import UNet, unet_sites

logger = logging.getLogger("fusedid")
HASH_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded base. `pipeline` is diffusers' own object around the same parts, for drawing pictures."""

    name: str
    family: str
    pipeline: Any
    prompts: PromptEncoder

    @property
    def unet(self) -> UNet:
        """The UNet, fp32 as loaded."""
        return self.pipeline.unet

    @property
    def vae(self) -> Any:
        """The AutoencoderKL, or an AutoencoderTiny."""
        return self.pipeline.vae

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1] -> scaled latents `[B, 4, h, w]`: the mean, or a sample by `noise`.

        An AutoencoderTiny has no distribution: its latents are all there is.
        """
        return self.from_moments(vae_moments(self.vae, pixels), noise)

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Cached VAE moments `[B, 8, h, w]` (mean, log variance) -> scaled latents."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return scaled_latents(self.vae, mean, (0.5 * log_variance.clamp(-30, 20)).exp(), noise)


NO_SPREAD = -30.0
"""Log variance of latents that are exact; diffusers clamps there too."""


def vae_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Mean and log variance `[B, 8, h, w]`, unscaled, of pixels `[B, 3, H, W]` in [-1, 1]."""
    encoded = vae.encode(pixels.to(vae.dtype))
    if not is_tiny(vae):
        return encoded.latent_dist.parameters
    return torch.cat([encoded.latents, torch.full_like(encoded.latents, NO_SPREAD)], dim=1)


def is_tiny(vae: Any) -> bool:
    """Whether this is an autoencoder in TAESD's layout instead of an AutoencoderKL."""
    return type(vae).__name__ == "AutoencoderTiny"


def scaled_latents(vae: Any, mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    """Latents in the UNet's scale."""
    latents = mean if noise is None else mean + std * noise.to(mean)
    return latents * vae.config.scaling_factor


def load_base(options: ModelConfig) -> BaseModel:
    """Loads UNet, VAE and text encoders in fp32, frozen.

    Raises ValueError when the path is missing, is no such model, or is of another family than `options.family`.
    """
    path = Path(options.base).expanduser()
    if not path.exists():
        raise ValueError(
            f"model.base: {options.base} does not exist. Give a diffusers folder (with model_index.json) or a "
            "`.safetensors` checkpoint of SD1.5 or SDXL"
        )
    pipeline = _from_folder(path) if path.is_dir() else _from_file(path, options.config)
    family = _checked_family(pipeline.unet, options)
    if options.vae is not None:
        pipeline.register_modules(vae=_load_vae(options.vae))
    for part in (pipeline.unet, pipeline.vae):
        part.requires_grad_(False).eval()
    return BaseModel(path.name, family, pipeline, PromptEncoder(_text_parts(pipeline)))


def _from_folder(path: Path) -> Any:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"model.base: {path} has no model_index.json, so it is no diffusers model. Give the folder that holds "
            "unet/, vae/, text_encoder/ and model_index.json, or a `.safetensors` checkpoint"
        )
    name = DiffusionPipeline.load_config(path).get("_class_name")
    kinds = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
    if name not in kinds:
        raise ValueError(f"model.base: {path} is a {name}; FusedID trains on SD1.5 and SDXL (UNet models) only")
    extra = {"safety_checker": None} if name == "StableDiffusionPipeline" else {}
    whole = {"local_files_only": True, "torch_dtype": torch.float32, **extra}
    return _loaded(path, lambda: kinds[name].from_pretrained(path, **whole))


def _from_file(path: Path, config: str | None) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    header = read_header(path)
    if header.kind == "base":  # the miniature's own form
        return load_miniature(path)
    kind = _checkpoint_kind(header.shapes)
    if kind is None:
        raise ValueError(
            f"model.base: {path.name} is {foreign_family(header.shapes)}; needed is a whole SD1.5 or SDXL checkpoint "
            "with UNet, VAE and text encoder"
        )
    pipeline = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    extra: dict[str, Any] = {} if kind == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    if config is not None:
        extra |= {"config": config, "local_files_only": True}
    return _loaded(path, lambda: pipeline.from_single_file(str(path), **extra))


def _checkpoint_kind(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """`sd` or `sdxl` for a whole checkpoint in LDM names, None for anything else."""
    parts = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight")
    if not all(part in shapes for part in parts):
        return None
    return "sdxl" if any(name.startswith("conditioner.embedders.1.") for name in shapes) else "sd"


def _loaded(path: Path, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        hint = "" if path.is_dir() else (
            ". diffusers fetches the config files of a single-file checkpoint from the network; without network set "
            "model.config to a diffusers folder of the same kind"
        )  # fmt: skip
        raise ValueError(f"model.base: {path.name} could not be loaded ({error}){hint}") from error


def _checked_family(unet: UNet, options: ModelConfig) -> str:
    family = family_of(entry.site for entry in unet_sites(unet))
    if options.family not in ("auto", family):
        raise ValueError(
            f"model.base: {options.base} is {_label(family)}, but model.family asks for {_label(options.family)}. "
            "Give a base model of that family, or change model.family"
        )
    return family


def _label(family: str) -> str:
    return next((entry.label for entry in FAMILIES if entry.name == family), f"a {family} layout")


def _load_vae(path: str) -> Any:
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.vae: {path} is no diffusers folder with an AutoencoderKL ({error})") from error


def _text_parts(pipeline: Any) -> list[tuple[Any, Any]]:
    names = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    pairs = [(getattr(pipeline, tokenizer, None), getattr(pipeline, encoder, None)) for tokenizer, encoder in names]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]


def base_hash(path: Path | str) -> str:
    """sha256 of the weights: of the single file, or of a folder's UNet files in name order."""
    path = Path(path).expanduser()
    files = [path] if path.is_file() else sorted((path / "unet").glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(HASH_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
