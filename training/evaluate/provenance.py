"""What made the numbers: the hash of every model, versions, machine, and the command line without its folders."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attention.files import read_header
from faces.encoder import FaceEncoder
from faces.sessions import file_sha256
from training.config import ModelConfig
from training.result import versions, without_folders

from .config import NO_FILE, Protocol, RowConfig

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
KINDS = ("*.safetensors", "*.bin")
LIBRARIES = ("numpy", "pillow", "scikit-image", "onnxruntime", "onnxruntime-gpu")


def base_files(model: ModelConfig) -> dict[str, str]:
    """File -> sha256 of every weight file of the base model, and of another VAE where one is set.

    Raises ValueError when the base does not exist.
    """
    path = Path(model.base).expanduser()
    if not path.exists():
        raise ValueError(f"model.base: {model.base} does not exist; give a diffusers folder or a .safetensors file")
    files = {path.name: path} if path.is_file() else {}
    folders = {part: path / part for part in PARTS}
    if model.vae is not None:
        folders["vae"] = Path(model.vae).expanduser()
    for part, folder in folders.items():
        files |= {f"{part}/{file.name}": file for kind in KINDS for file in sorted(folder.glob(kind))}
    return {name: file_sha256(file) for name, file in files.items()}


def adapter_path(row: RowConfig, weights: str | None) -> str:
    """Where a row's adapter lies: absolute paths as they are, others below `weights` where that is given."""
    if row.adapter in NO_FILE or weights is None:
        return row.adapter
    return str(Path(weights).expanduser() / row.adapter)


def adapter_facts(path: str) -> dict[str, Any]:
    """File name, sha256, and what the file says about how it was trained; or only what stands for a file.

    Raises ValueError when the file is missing or no safetensors file.
    """
    if path in NO_FILE:
        return {"name": path}
    header = read_header(Path(path).expanduser())
    told = {name.removeprefix("fusedid."): text for name, text in header.metadata.items() if len(text) <= 100}
    return {"name": header.path.name, "sha256": file_sha256(header.path), "trained": dict(sorted(told.items()))}


def encoder_facts(encoder: FaceEncoder) -> dict[str, Any]:
    """Name, hashes and licence of the face pack that judges."""
    print_ = encoder.fingerprint
    return {
        "name": print_.name,
        "backend": print_.backend,
        "detector_sha256": print_.detector_sha256,
        "recogniser_sha256": print_.recogniser_sha256,
        "dim": print_.dim,
        "license": print_.license,
    }


def all_versions() -> dict[str, str]:
    """Python and every library that a number depends on."""
    found = versions()
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: str) -> dict[str, str]:
    """What it ran on: system, processor, and the GPU's name where one was used."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return {"system": platform.system(), "processor": platform.machine(), "device": device, "gpu": gpu}


def protocol_hash(protocol: Protocol) -> str:
    """sha256 of every setting; where the files lie does not count."""
    settings = json.dumps(without_folders(protocol.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


def command_line(arguments: Sequence[str]) -> str:
    """The command, with folders cut down to their names, because results are published."""
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        words.append(f"{name}={without_folders(value)}" if equals else without_folders(word))
    return shlex.join(["python", "-m", "training.evaluate", *words])
