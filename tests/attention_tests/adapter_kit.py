"""Small adapters for a made-up UNet, and safetensors files written byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from attention.adapter import KEY_SUFFIX, VALUE_SUFFIX, AdapterSettings, Projection, save_adapter
from attention.sites import SD15_SITES, Site

SITES = tuple(Site(site.path, 8 if site.channels < 1280 else 16, 2, 768, site.level) for site in SD15_SITES)
"""The names of SD1.5 at a small width."""


def projections(sites: Iterable[Site] = SITES, *, seed: int = 0) -> dict[str, Projection]:
    generator = torch.Generator().manual_seed(seed)
    return {site.path: Projection(*torch.randn(2, site.channels, site.channels, generator=generator)) for site in sites}


def write_adapter(path: Path, sites: Iterable[Site] = SITES, **how: Any) -> Path:
    settings = how.pop("settings", AdapterSettings(base="sd15"))
    save_adapter(path, projections(sites), settings, **how)
    return path


def rewrite(
    path: Path, *, tensors: dict[str, Tensor | None] | None = None, metadata: dict[str, str | None] | None = None
) -> Path:
    """The same file with some tensors and metadata exchanged, added, or (None) taken out."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = dict(file.metadata())
    new = {name: tensor for name, tensor in {**old, **(tensors or {})}.items() if tensor is not None}
    said = {name: text for name, text in {**notes, **(metadata or {})}.items() if text is not None}
    save_file(new, path, metadata=said)
    return path


def first_names() -> tuple[str, str]:
    """Key and value weights of the first site."""
    return SITES[0].path + KEY_SUFFIX, SITES[0].path + VALUE_SUFFIX


def raw_safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header: 8 bytes of its length, JSON, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
