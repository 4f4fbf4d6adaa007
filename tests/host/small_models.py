"""Random-weight models in the host's real file formats, small enough for a CPU, loaded by the host's own nodes.

Writing the files needs no host; the `load_` functions do. Weights are seeded per key and scaled so that activations
stay near unit variance and the text visibly changes the prediction.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_layouts import (
    LAYOUTS,
    MODEL_CHANNELS,
    Shape,
    clip_g_shapes,
    clip_l_shapes,
    controlnet_shapes,
    taesd_decoder_shapes,
    taesd_encoder_shapes,
    unet_shapes,
)
from safetensors.torch import load_file, save_file

COLOURS = [0, 1, 2]
VAE_NOISE = 0.05
NOISE_GAIN, PASS_GAIN = 0.1, 8.0


def random_weights(
    shapes: dict[str, Shape], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Gaussian weights of gain 1 (variance 1/fan_in); norms near 1, biases near 0. Each key has its own seed."""
    return {name: _random_weight(name, shape, seed).to(dtype) for name, shape in shapes.items()}


def _random_weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return values.mul_(0.05).add_(1.0 if name.endswith("weight") else 0.0)
    if "embedding" in name:
        return values
    return values.mul_(1 / math.sqrt(math.prod(shape[1:])))


def unet_weights(
    layout: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, noise_gain: float = NOISE_GAIN
) -> dict[str, torch.Tensor]:
    """A random UNet that predicts about its own (scaled) input as the noise, so that samples end near unit size.

    The first convolution's skip carries each latent channel c as the pair (c, -c) to the last block, and
    silu(c) - silu(-c) = c brings it through the output layer; everything else is random, with `noise_gain` at the end.
    """
    weights = random_weights(unet_shapes(LAYOUTS[layout]), seed=seed)
    last_block = max(int(name.split(".")[1]) for name in weights if name.startswith("output_blocks."))
    skip = weights[f"output_blocks.{last_block}.0.skip_connection.weight"]
    first, last = weights["input_blocks.0.0.weight"], weights["out.2.weight"].mul_(noise_gain)
    from_skip = skip.shape[1] - MODEL_CHANNELS
    for channel in range(4):
        for place, sign in ((2 * channel, 1.0), (2 * channel + 1, -1.0)):
            first[place] = 0.0
            first[place, channel, 1, 1] = sign
            skip[place, from_skip + place] += PASS_GAIN
            last[channel, place, 1, 1] += sign
    return {name: weight.to(dtype) for name, weight in weights.items()}


def _taesd_weights(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Encoder and decoder that pass the three colours through, averaged over 8 x 8 pixels, beside 5 % of noise.

    Latents are 4 * (pixel - 0.5), so that a picture survives a round trip as its blurred self.
    """
    encoder = {name: weight * VAE_NOISE for name, weight in random_weights(taesd_encoder_shapes(), seed=seed).items()}
    decoder = {name: weight * VAE_NOISE for name, weight in random_weights(taesd_decoder_shapes(), seed=seed).items()}
    for name in ("2", "6", "10"):
        encoder[f"{name}.weight"][COLOURS, COLOURS, 1:, 1:] += 0.25  # stride 2: the mean of 2 x 2
    for weights, name, gain in ((encoder, "0", 1.0), (encoder, "14", 4.0), (decoder, "1", 0.25)):
        weights[f"{name}.weight"][COLOURS, COLOURS, 1, 1] += gain
    for name in ("7", "12", "17", "19"):
        decoder[f"{name}.weight"][COLOURS, COLOURS, 1, 1] += 1.0
    encoder["14.bias"][COLOURS] -= 2.0
    decoder["1.bias"][COLOURS] += 0.5
    return encoder, decoder


@dataclass(frozen=True)
class SmallModels:
    """Writes each file once into a folder shaped like ComfyUI's `models` and loads it through the host's nodes."""

    models_dir: Path

    def unet(self, layout: str = "sd15_small", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
        """`models/diffusion_models/<layout>_<seed>_<dtype>.safetensors`, for UNETLoader. Layouts: `LAYOUTS`."""
        suffix = str(dtype).removeprefix("torch.")
        path = self._path("diffusion_models", f"{layout}_{seed}_{suffix}.safetensors")
        if not path.exists():
            save_file(unet_weights(layout, seed=seed, dtype=dtype), path)
        return path

    def vae(self, *, seed: int = 0) -> str:
        """TAESD-layout encoder and decoder in `models/vae_approx`; returns the name VAELoader shows, `taesd`."""
        for part, weights in zip(("encoder", "decoder"), _taesd_weights(seed)):
            path = self._path("vae_approx", f"taesd_{part}.safetensors")
            if not path.exists():
                save_file(weights, path)
        return "taesd"

    def clip(self, *, seed: int = 0) -> Path:
        """A CLIP-L text encoder (123 M weights, 246 MB as fp16) for CLIPLoader."""
        path = self._path("text_encoders", f"clip_l_{seed}.safetensors")
        if not path.exists():
            save_file(random_weights(clip_l_shapes(), seed=seed, dtype=torch.float16), path)
        return path

    def checkpoint(self, layout: str = "sd15_small", *, seed: int = 0) -> Path:
        """UNet, VAE and (SD1.5 only) text encoder in one fp16 file for CheckpointLoaderSimple."""
        path = self._path("checkpoints", f"{layout}_{seed}.safetensors")
        if path.exists():
            return path
        encoder, decoder = _taesd_weights(seed)
        unet = unet_weights(layout, seed=seed, dtype=torch.float16)
        is_sd15 = LAYOUTS[layout].context_dim == 768
        clip = random_weights(clip_l_shapes(), seed=seed, dtype=torch.float16) if is_sd15 else {}
        weights = {
            **_prefixed("model.diffusion_model.", unet),
            **_prefixed("first_stage_model.taesd_encoder.", encoder),
            **_prefixed("first_stage_model.taesd_decoder.", decoder),
            **_prefixed("cond_stage_model.transformer.", clip),
            "first_stage_model.vae_scale": torch.tensor(0.18215 if is_sd15 else 0.13025),
            "first_stage_model.vae_shift": torch.tensor(0.0),
        }
        save_file(weights, path)
        return path

    def sdxl_checkpoint(self, layout: str = "sdxl_tiny", *, seed: int = 0) -> Path:
        """As `checkpoint`, with both text encoders. CLIP-G's layers are zeros that take no room on the disk."""
        path = self._path("checkpoints", f"{layout}_{seed}_text.safetensors")
        if path.exists():
            return path
        clip_g = clip_g_shapes()
        read = {name: shape for name, shape in clip_g.items() if ".resblocks." not in name}
        weights = {
            **load_file(self.checkpoint(layout, seed=seed)),
            **_prefixed(
                "conditioner.embedders.0.transformer.", random_weights(clip_l_shapes(), seed=seed, dtype=torch.float16)
            ),
            **_prefixed("conditioner.embedders.1.model.", random_weights(read, seed=seed, dtype=torch.float16)),
        }
        zeros = {f"conditioner.embedders.1.model.{name}": clip_g[name] for name in clip_g.keys() - read.keys()}
        save_sparse(path, weights, zeros)
        return path

    def adapter(self, layout: str = "sd15_small", *, seed: int = 0, reference_size: int = 64) -> Path:
        """A random fusion adapter with every site of a layout, in `models/fusedid`, with a reference prompt."""
        from attention.adapter import AdapterSettings, Projection, save_adapter

        size = "" if reference_size == 64 else f"_{reference_size}px"
        path = self._path("fusedid", f"{layout}_{seed}{size}.safetensors")
        if path.exists():
            return path
        suffix = ".attn2.to_q.weight"
        shapes = unet_shapes(LAYOUTS[layout])
        widths = {name.removesuffix(suffix): shape for name, shape in shapes.items() if name.endswith(suffix)}
        keys, values = (random_weights(widths, seed=2 * seed + i + 1) for i in range(2))
        base = layout.removesuffix("_full")
        settings = AdapterSettings(base=base if base in ("sd15", "sdxl") else "custom", reference_size=reference_size)
        context, extra = self.conditioning(layout, seed=seed)[0]
        save_adapter(
            path,
            {site: Projection(keys[site], values[site]) for site in widths},
            settings,
            prompt_context=context[0],
            prompt_pooled=extra["pooled_output"][0],
        )
        return path

    def controlnet(self, layout: str = "sd15_full", *, seed: int = 0) -> Path:
        """A random ControlNet of a layout, for ControlNetLoader; it adds about a tenth of the UNet's activations."""
        path = self._path("controlnet", f"{layout}_{seed}.safetensors")
        if not path.exists():
            save_file(random_weights(controlnet_shapes(LAYOUTS[layout]), seed=seed, dtype=torch.float16), path)
        return path

    def lora(self, layout: str = "sd15_full", *, seed: int = 0) -> Path:
        """A random LoRA of rank 2 on the queries of every cross-attention, for LoraLoader."""
        path = self._path("loras", f"{layout}_{seed}.safetensors")
        if not path.exists():
            suffix = ".attn2.to_q.weight"
            widths = {k: v[0] for k, v in unet_shapes(LAYOUTS[layout]).items() if k.endswith(suffix)}
            down = {f"diffusion_model.{k[:-7]}.lora_down.weight": (2, width) for k, width in widths.items()}
            up = {f"diffusion_model.{k[:-7]}.lora_up.weight": (width, 2) for k, width in widths.items()}
            save_file(random_weights(down | up, seed=seed), path)
        return path

    def load_unet(self, layout: str = "sd15_small", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """A fresh ModelPatcher from the host's UNETLoader."""
        path = self.unet(layout, seed=seed, dtype=dtype)
        return _host_node("UNETLoader").load_unet(path.name, "default")[0]

    def load_vae(self, *, seed: int = 0) -> Any:
        """A `comfy.sd.VAE` (8 pixels per latent, 4 channels) from the host's VAELoader."""
        return _host_node("VAELoader").load_vae(self.vae(seed=seed))[0]

    def load_clip(self, *, seed: int = 0) -> Any:
        """A `comfy.sd.CLIP` from the host's CLIPLoader; needs about a second and 0.5 GB."""
        return _host_node("CLIPLoader").load_clip(self.clip(seed=seed).name, "stable_diffusion")[0]

    def load_checkpoint(self, layout: str = "sd15_small", *, seed: int = 0) -> tuple[Any, Any, Any]:
        """(MODEL, CLIP or None, VAE) from the host's CheckpointLoaderSimple."""
        return _host_node("CheckpointLoaderSimple").load_checkpoint(self.checkpoint(layout, seed=seed).name)[:3]

    def conditioning(self, layout: str = "sd15_small", *, seed: int = 0, tokens: int = 77) -> list[list[Any]]:
        """CONDITIONING with Gaussian tokens `float [1, tokens, context_dim]`, as CLIPTextEncode would return it."""
        context_dim = LAYOUTS[layout].context_dim
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, 768 if context_dim == 768 else 1280, generator=generator)
        return [[torch.randn(1, tokens, context_dim, generator=generator), {"pooled_output": pooled}]]

    def _path(self, folder: str, name: str) -> Path:
        (self.models_dir / folder).mkdir(parents=True, exist_ok=True)
        return self.models_dir / folder / name


def save_sparse(path: Path, weights: dict[str, torch.Tensor], zeros: dict[str, Shape]) -> None:
    """A safetensors file in which fp16 zeros of these shapes follow the weights as a hole in the file."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in weights.items():
        size = tensor.numel() * tensor.element_size()
        kind = {torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    for name, shape in zeros.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            file.write(tensor.contiguous().numpy().tobytes())
        file.truncate(8 + len(text) + end)


def _prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: weight for name, weight in weights.items()}


def _host_node(node_id: str) -> Any:
    import nodes  # the host's: callers hold the `comfyui` fixture

    return nodes.NODE_CLASS_MAPPINGS[node_id]()
