"""Stage ``cache``: what frozen models say about the packed samples, one safetensors file per shard and kind."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from .config import PrepareConfig
from .encoders import (
    cached_kinds,
    choose_device,
    encode_moments,
    encode_style,
    encode_texts,
    load_base_parts,
    load_vision,
    model_hash,
)
from .pack import shard_path
from .stage import Context, Stage, Tables
from .tables import Row

SCHEMA = pa.schema([("key", pa.string()), ("cached", pa.list_(pa.string()))])
PORTION = 64


def cache_path(kind: str, shard: int) -> str:
    """Where a kind of cache of a packed shard lies in the output."""
    return f"cache/{kind}/{shard:06d}.safetensors"


def cache(context: Context, tables: Tables, shard: int) -> list[Row]:
    """Encode one shard's samples; one row per packed sample, with the kinds that were cached."""
    kinds = cached_kinds(context.config.cache)
    rows = [row for row in tables["pack"] if row["reason"] is None]
    makers = {"vae": _vae, "text": _text, "clip_vision": _clip_vision}
    for kind in kinds:
        tensors = makers[kind](context, rows, shard)
        context.output.write(cache_path(kind, shard), _safetensors(tensors, context.config, kind))
    return [{"key": row["key"], "cached": list(kinds) if row["reason"] is None else []} for row in tables["pack"]]


def _vae(context: Context, rows: list[Row], shard: int) -> dict[str, Any]:
    config = context.config.cache
    vae, _ = load_base_parts(str(config.base_model), choose_device(config.device))
    tensors: dict[str, Any] = {}
    for member in ("target", "reference"):
        for some in _portions([row for row in rows if row[f"{member}_size"]]):
            pictures = [_picture(context, row, member, shard) for row in some]
            for row, moments in zip(some, encode_moments(vae, pictures, config.batch_size), strict=True):
                tensors[f"{row['key']}/{member}"] = moments
    return tensors


def _text(context: Context, rows: list[Row], shard: int) -> dict[str, Any]:
    from training.shards import EMPTY_PROMPT

    config = context.config.cache
    _, prompts = load_base_parts(str(config.base_model), choose_device(config.device))
    captions = ["", *(_read(context, row, "text", shard).decode() for row in rows)]
    names = [EMPTY_PROMPT, *(row["key"] for row in rows)]
    encoded = encode_texts(prompts, captions, config.batch_size)
    return {f"{name}/{part}": value for name, entry in zip(names, encoded) for part, value in entry.items()}


def _clip_vision(context: Context, rows: list[Row], shard: int) -> dict[str, Any]:
    config = context.config.cache
    towers = load_vision(config.clip_vision, choose_device(config.device))
    tensors: dict[str, Any] = {}
    for some in _portions(rows):
        pictures = [_style_picture(context, row, shard) for row in some]
        encoded = encode_style(towers, pictures, config.batch_size)
        tensors |= {row["key"]: value for row, value in zip(some, encoded, strict=True)}
    return tensors


def _style_picture(context: Context, row: Row, shard: int) -> Any:
    """The target without its face as float ``[H, W, 3]`` in [0, 1], hidden exactly as the node hides it."""
    from attention.guidance_style import hide_region
    from training.augment import to_rgb01

    image = to_rgb01(_picture(context, row, "target", shard))
    if not row["mask_size"]:
        return image
    region = to_rgb01(_picture(context, row, "mask", shard))[..., 0]
    return hide_region(image[None], region[None])[0]


def _portions(rows: list[Row]) -> list[list[Row]]:
    """Few enough pictures at a time for memory; a shard at once would need a gigabyte."""
    return [rows[start : start + PORTION] for start in range(0, len(rows), PORTION)]


def _picture(context: Context, row: Row, member: str, shard: int) -> np.ndarray:
    with Image.open(io.BytesIO(_read(context, row, member, shard))) as image:
        return np.array(image.convert("RGB"))


def _read(context: Context, row: Row, member: str, shard: int) -> bytes:
    if not row[f"{member}_size"]:
        return b""
    return context.output.read_range(shard_path(shard), row[f"{member}_offset"], row[f"{member}_size"])


def _safetensors(tensors: dict[str, Any], config: PrepareConfig, kind: str) -> bytes:
    from safetensors.torch import save

    metadata = {"fusedid.kind": f"cache-{kind}", "fusedid.format": "1", **cache_models(config)}
    return save(tensors, metadata=metadata)


def cache_models(config: PrepareConfig) -> dict[str, str]:
    """sha256 of the models whose outputs are cached, by name."""
    paths = [config.cache.base_model] if config.cache.base_model else []
    return {f"model.{path}": model_hash(path) for path in [*paths, *config.cache.clip_vision]}


def _options(config: PrepareConfig) -> list[Any]:
    return [sorted(cached_kinds(config.cache)), sorted(cache_models(config).values())]


STAGE = Stage(
    "cache",
    1,
    ("pack",),
    SCHEMA,
    _options,
    each=cache,
    alone=True,
    products=lambda config, shard: tuple(cache_path(kind, shard) for kind in cached_kinds(config.cache)),
)
