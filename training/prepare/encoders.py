"""The frozen models whose outputs can be cached: VAE, text encoders, CLIP vision. Loaded once per process."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .config import CacheConfig

OPEN_CLIP = "open_clip:"
_WEIGHTS = ("*.safetensors", "*.bin")


def choose_device(wanted: str) -> str:
    """``auto`` as the first CUDA device, else the CPU."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_hash(path: str) -> str:
    """sha256 over the names and bytes of a model's weight files: one file, or all in a folder.

    open_clip keeps its own files, so there the name stands for them. ``ValueError`` when nothing is there.
    """
    if path.startswith(OPEN_CLIP):
        return hashlib.sha256(path.encode()).hexdigest()
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"the model {path} does not exist; check cache.base_model and cache.clip_vision")
    files = [root] if root.is_file() else sorted(file for kind in _WEIGHTS for file in root.rglob(kind))
    if not files:
        raise ValueError(f"the model folder {path} holds no .safetensors or .bin weights; give a diffusers folder")
    return _hash_files(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=2)
def load_base_parts(path: str, device: str) -> tuple[Any, Any]:
    """(VAE, prompt encoder) of a base model, fp32 on ``device``; the UNet is not kept."""
    from training.base import load_base
    from training.config import ModelConfig

    base = load_base(ModelConfig(base=path))
    vae, prompts = base.vae.to(device), base.prompts.to(device)
    base.pipeline.register_modules(unet=None)
    del base
    gc.collect()
    return vae, prompts


@lru_cache(maxsize=2)
def load_vision(paths: tuple[str, ...], device: str) -> Any:
    """The CLIP vision towers, the trainer's own so that cached and fresh embeddings are equal, on ``device``."""
    from training.vision import VisionTowers

    return VisionTowers([_tower(path) for path in paths]).to(device)


def _tower(path: str) -> Any:
    from training.config import TowerConfig

    if path.startswith(OPEN_CLIP):
        return TowerConfig(name=path, width=_open_clip_width(path), path=path)
    from transformers import CLIPVisionConfig

    try:
        width = CLIPVisionConfig.from_pretrained(path, local_files_only=True).projection_dim
    except (OSError, ValueError) as error:
        raise ValueError(f"cache.clip_vision: {path} is no transformers CLIP vision folder ({error})") from error
    return TowerConfig(name=path, width=width, path=str(Path(path).expanduser()))


def _open_clip_width(path: str) -> int:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(f"cache.clip_vision: {path} needs open_clip: pip install open_clip_torch") from error
    architecture = path.removeprefix(OPEN_CLIP).partition("/")[0]
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"cache.clip_vision: open_clip has no model {architecture!r}; see open_clip.list_models()")
    return int(config["embed_dim"])


def encode_moments(vae: Any, pictures: Sequence[np.ndarray], batch: int) -> list[Any]:
    """VAE moments (mean, log variance; unscaled) as fp16 ``[8, h, w]`` of uint8 ``[H, W, 3]`` pictures of any sizes."""
    import torch

    from training.base import vae_moments

    results: list[Any] = [None] * len(pictures)
    for places in _same_shape(pictures, batch):
        pixels = torch.from_numpy(np.stack([pictures[place] for place in places])).to(vae.device)
        with torch.inference_mode():
            moments = vae_moments(vae, pixels.permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1)
        for place, row in zip(places, moments.to(torch.float16).cpu(), strict=True):
            results[place] = row.contiguous()
    return results


def encode_style(towers: Any, images: Sequence[Any], batch: int) -> list[Any]:
    """CLIP embeddings of all towers side by side, fp32 ``[S]`` each, of float images ``[H, W, 3]`` in [0, 1]."""
    import torch

    device = next(towers.parameters()).device
    results: list[Any] = [None] * len(images)
    for places in _same_shape(images, batch):
        rows = towers(torch.stack([images[place] for place in places]).to(device)).cpu()
        for place, row in zip(places, rows, strict=True):
            results[place] = row.clone()
    return results


def encode_texts(prompts: Any, captions: Sequence[str], batch: int) -> list[dict[str, Any]]:
    """Text context ``[T, D_c]`` (and ``pooled [P]`` for SDXL) in fp16 for each caption."""
    import torch

    results = []
    for start in range(0, len(captions), batch):
        with torch.inference_mode():
            tokens, pooled = prompts(list(captions[start : start + batch]))
        for row in range(len(tokens)):
            entry = {"context": tokens[row].to(torch.float16).cpu().contiguous()}
            if pooled is not None:
                entry["pooled"] = pooled[row].to(torch.float16).cpu().contiguous()
            results.append(entry)
    return results


def cached_kinds(config: CacheConfig) -> tuple[str, ...]:
    """Which caches the settings ask for."""
    kinds: tuple[str, ...] = ("vae",) if config.base_model and config.vae else ()
    kinds += ("text",) if config.base_model and config.text else ()
    return kinds + (("clip_vision",) if config.clip_vision else ())


def _same_shape(pictures: Sequence[Any], batch: int) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(place)
    return [places[start : start + batch] for places in groups.values() for start in range(0, len(places), batch)]


@lru_cache(maxsize=16)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(Path(path).name.encode())
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
