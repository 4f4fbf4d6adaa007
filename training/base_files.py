"""A whole base model in ComfyUI's files: names of the autoencoder's weights, and one checkpoint for its loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .unet_naming import unet_to_ldm
from .unet_sites import layers_per_block

SD15_SCALE = 0.18215
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def vae_to_taesd(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AutoencoderTiny's weights under TAESD's names, with the scale that undoes what ComfyUI does to SD1.5 latents.

    TAESD's decoder begins with its clamp as module 0, which diffusers keeps outside its list.
    """
    named = {_taesd_name(name): weight.contiguous() for name, weight in weights.items()}
    return {**named, "vae_scale": torch.tensor(SD15_SCALE), "vae_shift": torch.tensor(0.0)}


def taesd_to_vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `vae_to_taesd`."""
    found = {}
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        if rest:
            number, _, leaf = rest.partition(".")
            place = int(number) - (part == "taesd_decoder")
            found[f"{part.removeprefix('taesd_')}.layers.{place}.{leaf}"] = weight
    return found


def _taesd_name(name: str) -> str:
    part, layers, number, leaf = name.split(".", 3)
    assert layers == "layers", name
    return f"taesd_{part}.{int(number) + (part == 'decoder')}.{leaf}"


def comfy_checkpoint(unet: Any, vae: Any, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """UNet and TAESD-layout autoencoder as CheckpointLoaderSimple reads them. There is no text encoder in it."""
    named = unet_to_ldm(unet.state_dict(), layers_per_block(unet))
    weights = {UNET + name: weight for name, weight in named.items()}
    weights |= {VAE + name: weight for name, weight in vae_to_taesd(vae.state_dict()).items()}
    return {name: weight.detach().to(dtype).contiguous() for name, weight in weights.items()}
