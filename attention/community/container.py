"""Opening a community file: safetensors, or a torch file of tensors only, as one flat table of tensor names.

Published files nest (`image_proj`, `ip_adapter`), prefix, or name the same parts differently; here they all become
`image_proj.*` and `ip_adapter.*` where that is what they are.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import Header, read_header, read_tensors

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
DEEPEST = 4  # published files nest two levels
RENAMED = (
    ("image_proj_model.", "image_proj."),
    ("adapter_modules.", "ip_adapter."),
    ("id_adapter_attn_layers.", "ip_adapter."),
    ("id_adapter.", "image_proj."),
    ("module.", ""),
)
RENAMED_ENDS = ((".id_to_k.weight", ".to_k_ip.weight"), (".id_to_v.weight", ".to_v_ip.weight"))


@dataclass(frozen=True, eq=False)
class Container:
    """An opened file: shapes by our names, and the way to its tensors."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    _stored: Mapping[str, str]
    _source: Header | Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by our names, on the CPU in their stored dtype."""
        if isinstance(self._source, Header):
            stored: Mapping[str, Tensor] = read_tensors(self._source, [self._stored[name] for name in self.shapes])
        else:
            stored = self._source
        return {name: stored[self._stored[name]] for name in self.shapes}


def open_community(path: Path | str) -> Container:
    """Names and shapes of a community file. Tensors stay on disk where the format allows.

    Raises ValueError for files that are missing, truncated, of an unknown format, or that hold more than tensors:
    a torch file is only read with `weights_only=True`, so no code in it can run.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        header = read_header(path)
        names = {canonical(name): name for name in header.shapes}
        return Container(path, {ours: header.shapes[stored] for ours, stored in names.items()}, names, header)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name} has an unknown format; accepted: {', '.join(SUFFIXES)}")
    tensors = dict(_flat(path.name, _load_torch(path)))
    names = {canonical(name): name for name in tensors}
    return Container(path, {ours: tuple(tensors[stored].shape) for ours, stored in names.items()}, names, tensors)


def canonical(name: str) -> str:
    """Our name of a published tensor: `id_adapter_attn_layers.1.id_to_k.weight` -> `ip_adapter.1.to_k_ip.weight`."""
    for old, new in RENAMED:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    for old, new in RENAMED_ENDS:
        if name.endswith(old):
            name = name[: -len(old)] + new
    return name


def _load_torch(path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"{path.name}: no such file. Put it into the folder the drop-down lists and refresh")
    try:
        # Only the zip format can stay on disk until a tensor is used.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} was refused: it holds Python objects other than tensors, and loading those could run a "
            f"program ({_first_line(error)}). Get the .safetensors version, or the original file of the project"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path.name} is not a readable torch file ({_first_line(error)}). It may be truncated: download it again"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return next((line.strip() for line in text.splitlines() if "GLOBAL" in line), text.splitlines()[0])[:160]


def _flat(name: str, content: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds {type(content).__name__} where a table of tensors is needed; it is no adapter")
    if depth >= DEEPEST:
        raise ValueError(f"{name} nests its tensors more than {DEEPEST} levels deep; it is no adapter")
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(name, value, f"{prefix}{key}.", depth + 1)
