"""The guidance file: the shared Linear and everything that gives its columns a meaning.

safetensors, `guidance.proj.weight` `[T * C, S + D]` and `guidance.proj.bias` `[T * C]`, fp32 by default (7 MB for the
paper's towers and one token). Metadata: `fusedid.*` strings, `fusedid.kind` = guidance, and `modelspec.*`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from .files import FORMAT, Header, read_header, read_tensors, require_finite, require_kind, write_atomic
from .guidance import Guidance
from .guidance_settings import GuidanceSettings, Tower

WEIGHT = "guidance.proj.weight"
BIAS = "guidance.proj.bias"
LONGEST_TOWERS_TEXT = 4096


def save_guidance(
    path: Path | str,
    guidance: Guidance,
    *,
    dtype: torch.dtype = torch.float32,
    extra_metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the file the HybridGuidance node loads, atomically. `extra_metadata` is added as it is.

    Raises ValueError when a weight is NaN or infinite.
    """
    tensors = {WEIGHT: guidance.linear.weight.to(dtype), BIAS: guidance.linear.bias.to(dtype)}
    require_finite(Path(path).name, tensors)
    settings = guidance.settings
    write_atomic(path, tensors, {**_modelspec(settings), **(extra_metadata or {}), **_to_metadata(settings)})


def load_guidance(path: Path | str) -> Guidance:
    """Reads and validates a guidance file; weights fp32 on the CPU, frozen.

    Raises ValueError when the file is truncated, of another kind, inconsistent with its own metadata, or holds NaN.
    """
    header = read_header(path)
    require_kind(header, "guidance")
    settings = read_settings(header)
    _check_shapes(header, settings)
    tensors = read_tensors(header, [WEIGHT, BIAS])
    _require_float(header, tensors)
    require_finite(header.path.name, tensors)
    guidance = Guidance(settings, fingerprint=_fingerprint(tensors, header.metadata))
    with torch.no_grad():
        guidance.linear.weight.copy_(tensors[WEIGHT])
        guidance.linear.bias.copy_(tensors[BIAS])
    return guidance.requires_grad_(False)


def read_settings(header: Header) -> GuidanceSettings:
    """The settings in a guidance file's metadata. Raises ValueError naming what is missing or malformed."""
    name, values = header.path.name, dict[str, object]()
    for entry in fields(GuidanceSettings):
        text = header.metadata.get(f"fusedid.{entry.name}")
        if text is None:
            continue
        values[entry.name] = _parse(name, entry.name, str(entry.type), text)
    missing = [key for key in ("base", "towers", "face_width", "face_encoder") if key not in values]
    if missing:
        raise ValueError(
            f"{name} does not say its {', '.join(missing)}: it is no complete guidance file. Export it again"
        )
    try:
        return GuidanceSettings(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Update FusedID, or get the file again") from error


def _parse(file: str, name: str, kind: str, text: str) -> object:
    if name == "towers":
        return _towers_from(file, text)
    if kind != "int":
        return text
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise ValueError(f"{file}: fusedid.{name} is {text[:40]!r}, expected a whole number")
    return int(text)


def _towers_from(file: str, text: str) -> tuple[Tower, ...]:
    try:
        rows = json.loads(text) if len(text) <= LONGEST_TOWERS_TEXT else None
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(_is_tower(row) for row in rows):
        raise ValueError(
            f'{file}: fusedid.towers is {text[:60]!r}, expected a list like [["ViT-L/14", 768]]. Export the file again'
        )
    return tuple(Tower(name, width) for name, width in rows)


def _is_tower(row: object) -> bool:
    return isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and type(row[1]) is int


def _check_shapes(header: Header, settings: GuidanceSettings) -> None:
    outputs = settings.num_tokens * settings.context_width
    expected = {WEIGHT: (outputs, settings.style_width + settings.face_width), BIAS: (outputs,)}
    strangers = sorted(set(header.shapes) - set(expected))
    if strangers:
        raise ValueError(f"{header.path.name} holds tensors no guidance file has, such as {strangers[0]}")
    for key, shape in expected.items():
        found = header.shapes.get(key)
        if found != shape:
            raise ValueError(
                f"{header.path.name}: {key} is {'missing' if found is None else list(found)}, but its own metadata "
                f"asks for {list(shape)} ({settings.num_tokens} tokens of {settings.context_width} from "
                f"{settings.tower_names} and {settings.face_width} face numbers). Export the file again"
            )


def _require_float(header: Header, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{header.path.name}: {key} holds {tensor.dtype}, expected floating point weights")


def _to_metadata(settings: GuidanceSettings) -> dict[str, str]:
    values = {f"fusedid.{key}": str(value) for key, value in asdict(settings).items() if key != "towers"}
    towers = json.dumps([[tower.name, tower.width] for tower in settings.towers])
    return {"fusedid.format": FORMAT, "fusedid.kind": "guidance", **values, "fusedid.towers": towers}


def _modelspec(settings: GuidanceSettings) -> dict[str, str]:
    architecture = {"sd15": "stable-diffusion-v1", "sd20": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1"}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture.get(settings.base, 'custom')}/fusedid-guidance",
        "modelspec.implementation": "fusedid",
        "modelspec.title": "FusedID hybrid guidance",
        "modelspec.license": settings.license,
    }


def _fingerprint(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
