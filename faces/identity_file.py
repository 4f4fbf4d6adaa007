"""The identity file: one person in a ``.safetensors`` that cannot run code and never crashes its reader.

Tensors: per reference ``reference.<n>.crop|embedding|keypoints|aligned``, and ``weights``, ``scores``, ``thumbnail`` (a
PNG's bytes). Metadata: ``fusedid.kind = identity``, ``fusedid.format``, ``fusedid.name``, ``fusedid.encoder`` (JSON).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .identity import EncoderFingerprint, Identity, Reference

SUFFIX = ".safetensors"
KIND, FORMAT = "identity", 1
MAX_BYTES = 1 << 30
MAX_REFERENCES = 1000
MAX_CROP = 4096
THUMBNAIL_SIDE = 256
PARTS = ("crop", "embedding", "keypoints", "aligned")
FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')


def identity_path(folder: Path, name: str) -> Path:
    """The file of an identity called ``name`` (``/`` for subfolders) inside ``folder``; anything outside is refused."""
    cleaned = name.strip().replace("\\", "/").removesuffix(SUFFIX)
    parts = cleaned.split("/")
    if (
        not cleaned
        or FORBIDDEN.search(cleaned)
        or any(part.strip(" .") == "" or part != part.strip() for part in parts)
    ):
        raise ValueError(
            f"{name!r} is not a usable name for an identity; use letters, digits, spaces, '-', '_' and '/' for "
            "subfolders, no '..', no drive and no leading '/'"
        )
    path = folder / (cleaned + SUFFIX)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leaves the identities folder {folder}; use a name inside it")
    return path


def save_identity(identity: Identity, path: Path, *, overwrite: bool = True) -> None:
    """Write the file whole or not at all: a crash or a full disk leaves the former file as it was.

    Raises ``FileExistsError`` where ``overwrite`` is off and there is one, also one that another process has just made.
    """
    from safetensors.numpy import save

    data = save(_tensors(identity), metadata=_metadata(identity))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".saving-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            Path(temporary).replace(path)
        else:
            _place_new(Path(temporary), path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _place_new(temporary: Path, path: Path) -> None:
    """Gives the file its name unless that is taken: one step, so that two processes never take the same."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as exFAT
        if path.exists():
            raise FileExistsError(path) from None
        temporary.replace(path)


def load_identity(path: Path) -> Identity:
    """Read an identity file. ``ValueError`` with the reason for anything that is not a sound one."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            encoder = _encoder(metadata)
            count = _count(set(file.keys()))
            return _identity(file, count, encoder, metadata.get("fusedid.name", ""))
    except FileNotFoundError as error:
        raise ValueError(f"the identity file {path} does not exist; save the identity first") from error
    except (SafetensorError, ValueError, OSError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path.name} cannot be used as an identity ({reason}); save it again with the FusedID Save Identity node"
        ) from error


def thumbnail(identity: Identity) -> np.ndarray:
    """The heaviest reference's crop as uint8 ``[256, 256, 3]``."""
    best = max(identity.references, key=lambda reference: reference.weight)
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.asarray(Image.fromarray(best.crop).resize(size, Image.Resampling.LANCZOS))


def _tensors(identity: Identity) -> dict[str, np.ndarray]:
    tensors = {
        f"reference.{number:03d}.{part}": np.ascontiguousarray(array)
        for number, reference in enumerate(identity.references)
        for part in PARTS
        if (array := getattr(reference, part)) is not None
    }
    tensors["weights"] = np.array([reference.weight for reference in identity.references], dtype=np.float64)
    tensors["scores"] = np.array([reference.score for reference in identity.references], dtype=np.float32)
    png = io.BytesIO()
    Image.fromarray(thumbnail(identity)).save(png, format="PNG")
    tensors["thumbnail"] = np.frombuffer(png.getvalue(), dtype=np.uint8)
    return tensors


def _metadata(identity: Identity) -> dict[str, str]:
    return {
        "fusedid.kind": KIND,
        "fusedid.format": str(FORMAT),
        "fusedid.name": identity.name,
        "fusedid.encoder": json.dumps(dataclasses.asdict(identity.encoder)),
    }


def _encoder(metadata: dict[str, str]) -> EncoderFingerprint:
    kind = metadata.get("fusedid.kind")
    if kind != KIND:
        raise ValueError(f"it is a {kind!r} file" if kind else "it was not written by FusedID")
    if metadata.get("fusedid.format") != str(FORMAT):
        raise ValueError(f"it has the format {metadata.get('fusedid.format')}, this FusedID reads {FORMAT}: update it")
    values: Any = json.loads(metadata.get("fusedid.encoder", ""))
    fields = {field.name: int if field.name == "dim" else str for field in dataclasses.fields(EncoderFingerprint)}
    if not isinstance(values, dict) or any(type(values.get(name)) is not type_ for name, type_ in fields.items()):
        raise ValueError("its encoder description is incomplete")
    return EncoderFingerprint(**{name: values[name] for name in fields})


def _count(keys: set[str]) -> int:
    numbers = {match.group(1) for key in keys if (match := re.fullmatch(r"reference\.(\d{3,4})\.crop", key))}
    count = len(numbers)
    if not 0 < count <= MAX_REFERENCES or numbers != {f"{number:03d}" for number in range(count)}:
        raise ValueError(f"its {count} references are not numbered from 0 to at most {MAX_REFERENCES - 1}")
    return count


def _identity(file: Any, count: int, encoder: EncoderFingerprint, name: str) -> Identity:
    keys = set(file.keys())
    weights, scores = file.get_tensor("weights"), file.get_tensor("scores")
    if weights.shape != (count,) or scores.shape != (count,):
        raise ValueError(f"it has {count} references but {weights.size} weights and {scores.size} scores")
    references = []
    for number in range(count):
        prefix = f"reference.{number:03d}."
        if any(side > MAX_CROP for side in file.get_slice(prefix + "crop").get_shape()):
            raise ValueError(f"reference {number} is larger than {MAX_CROP} pixels")
        parts: dict[str, Any] = {
            part: file.get_tensor(prefix + part) if prefix + part in keys else None for part in PARTS
        }
        references.append(Reference(**parts, weight=float(weights[number]), score=float(scores[number])))
    return Identity(tuple(references), encoder, name)
