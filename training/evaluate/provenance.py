"""What made the numbers: the hash of every model, versions, machine, and the command line without its folders."""

from __future__ import annotations

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
from training.result import versions, without_folders

from .config import NO_FILE, RowConfig

LIBRARIES = ("numpy", "pillow", "scikit-image", "onnxruntime", "onnxruntime-gpu")


def base_files(base: str) -> dict[str, str]:
    """File -> sha256 of every weight file of a base model: the single file, or all below the folder."""
    path = Path(base).expanduser()
    if path.is_file():
        return {path.name: file_sha256(path)}
    kinds = ("*.safetensors", "*.bin")
    files = sorted(file for kind in kinds for file in path.glob(f"*/{kind}"))
    return {file.relative_to(path).as_posix(): file_sha256(file) for file in files}


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


def command_line(arguments: Sequence[str]) -> str:
    """The command, with folders cut down to their names, because results are published."""
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        words.append(f"{name}={without_folders(value)}" if equals else without_folders(word))
    return shlex.join(["python", "-m", "training.evaluate", *words])
