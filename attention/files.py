"""Reading and writing safetensors with `fusedid.*` metadata.

A file from the internet is hostile until shown otherwise: the header is read first, nothing in it is trusted, and
every fault is a ValueError that names the file and the remedy.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "1"
KINDS = {"fusion": "FusedIDAttentionPatch", "guidance": "HybridGuidance", "identity": "FusedIDLoadIdentity"}
"""What our files hold, and the node that loads each."""
PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
LOOKALIKES = (
    (PICKLE_STARTS, "a PyTorch pickle, which could run code; only safetensors files are read here. Convert it"),
    ((b"version https://git-lfs",), "a Git LFS pointer instead of the file. Download the file itself"),
    ((b"<!doctype html", b"<html"), "a web page instead of the file. Download the file itself"),
)
"""What files under the name of a safetensors file often are, by their first bytes."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself before any tensor is read."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @property
    def kind(self) -> str | None:
        """`fusion`, `guidance`, `identity`, or None for files that are not ours."""
        return self.metadata.get("fusedid.kind")


def read_header(path: Path | str) -> Header:
    """Names, shapes and metadata of a safetensors file; no tensor is loaded.

    Raises ValueError for files that do not exist, are truncated, or are no safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.name}: no such file. Put the file into the folder the drop-down lists and refresh")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return Header(path, shapes, dict(file.metadata() or {}))
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        what = _lookalike(path) if isinstance(error, SafetensorError) else None
        reason = f"not a readable safetensors file ({error}). It may be truncated: download or save it again"
        raise ValueError(f"{path.name} is {what or reason}") from error


def _lookalike(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(64)
    text = start.lstrip().lower()
    return next((what for starts, what in LOOKALIKES if start.startswith(starts) or text.startswith(starts)), None)


def read_tensors(header: Header, names: list[str] | None = None) -> dict[str, Tensor]:
    """The named tensors (default: all), on the CPU in their stored dtype. Raises ValueError when one cannot be read."""
    try:
        with safe_open(header.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in (names if names is not None else header.shapes)}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{header.path.name} could not be read ({error}). Download or save it again") from error


def require_kind(header: Header, kind: str) -> None:
    """Raises ValueError unless the file is ours, of this kind, and of a format this version reads."""
    if header.kind != kind:
        loader = KINDS.get(header.kind or "")
        what = f"a FusedID {header.kind} file" if loader else foreign_family(header.shapes)
        remedy = f". Load it with {loader}" if loader else ""
        raise ValueError(f"{header.path.name} is {what}, but a FusedID {kind} file is needed here{remedy}")
    found = header.metadata.get("fusedid.format", "?")
    if found != FORMAT:
        raise ValueError(
            f"{header.path.name} has file format {found}, this version reads format {FORMAT}. Update FusedID"
        )


def require_finite(
    name: str, tensors: Mapping[str, Tensor], *, remedy: str = "The file is damaged; get it again"
) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{name}: the weights of {key} hold NaN or infinity. {remedy}")


def write_atomic(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes under a temporary name beside the target and renames: a killed process leaves the old file intact."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(_separate(tensors), temporary, metadata=dict(metadata))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, copied where they share memory: safetensors refuses tied weights and views."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous().cpu()
        memory = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return separate


def foreign_family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file of another project most likely is, told by its tensor names."""
    tests = (
        ("an InstantID or IP-Adapter file", lambda k: k.startswith(("ip_adapter.", "image_proj."))),
        ("a PuLID file", lambda k: k.startswith(("id_adapter", "pulid"))),
        ("a PhotoMaker file", lambda k: k.startswith("id_encoder.")),
        ("a LoRA", lambda k: ".lora_" in k or k.startswith("lora_")),
        ("a whole checkpoint", lambda k: k.startswith(("model.diffusion_model.", "first_stage_model."))),
        ("a VAE", lambda k: k.startswith(("encoder.conv_in", "decoder.conv_in"))),
        ("a ControlNet", lambda k: k.startswith(("control_model.", "controlnet_"))),
        ("a bare UNet", lambda k: k.startswith(("input_blocks.0.0.", "down_blocks.0.resnets"))),
    )
    for label, test in tests:
        if any(test(key) for key in shapes):
            return label
    return "no file of a known family"
