"""Opening a community file: safetensors, or a torch file of tensors only, as one flat table of tensor names.

Published files nest (`image_proj`, `ip_adapter`), prefix, or name the same parts differently; here they all become
`image_proj.*` and `ip_adapter.*` where that is what they are.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import Header, read_header, read_tensors

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
DEEPEST = 4  # published files nest two levels
MOST_ENTRIES = 100_000  # of all tables together; the largest published file has below 1000 tensors
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
    tensors = _flat(path.name, _load_torch(path))
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
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _require_uncompressed(path)
        # Only the zip format can stay on disk until a tensor is used.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} was refused: it holds Python objects other than tensors, and loading those could run a "
            f"program ({_first_line(error)}). Get the .safetensors version, or the original file of the project"
        ) from error
    except Exception as error:  # on damaged bytes the unpickler raises nearly every built-in exception
        raise ValueError(
            f"{path.name} is not a readable torch file ({_first_line(error)}). It may be truncated: download it again"
        ) from error


def _require_uncompressed(path: Path) -> None:
    """torch never compresses; a file that does may unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{packed[0]} in it is compressed, which no torch file is")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return next((line.strip() for line in text.splitlines() if "GLOBAL" in line), text.splitlines()[0])[:160]


def _flat(name: str, content: object) -> dict[str, Tensor]:
    """All tensors of nested tables by their dotted names. Bounded: one table may be referred to any number of times."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds {type(content).__name__} where a table of tensors is needed; it is no adapter")
    tensors: dict[str, Tensor] = {}
    entries = 0
    waiting: list[tuple[str, Mapping[object, object], int]] = [("", content, 1)]
    while waiting:
        prefix, table, depth = waiting.pop()
        entries += len(table)
        if depth > DEEPEST or entries > MOST_ENTRIES:
            raise ValueError(
                f"{name} nests its tensors more than {DEEPEST} levels deep or has more than {MOST_ENTRIES} entries; it "
                "is no adapter"
            )
        for key, value in table.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{key}"] = _checked(name, f"{prefix}{key}", value)
            elif isinstance(value, Mapping):
                waiting.append((f"{prefix}{key}.", value, depth + 1))
    return tensors


def _checked(name: str, key: str, tensor: Tensor) -> Tensor:
    """A few stored bytes may claim to be any number of weights (stride 0): such a tensor would fill the memory."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{name}: {key} {list(tensor.shape)} is no plain tensor with all its numbers in the file; get it again"
        )
    return tensor
