"""Which guidance files and priors are on disk, as the drop-downs show them."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import folder_paths

from ..attention.files import read_header
from ..attention.guidance import IDENTITY_NAME, Guidance, identity_linear
from ..attention.guidance_file import load_guidance
from .prior import NO_PRIOR

log = logging.getLogger("fusedid")

GUIDANCE_FOLDER = "fusedid"
PRIOR_FOLDER = "fusedid_priors"
VISION_FOLDER = "clip_vision"
SUFFIX = ".safetensors"


def register_prior_folder() -> None:
    """models/fusedid/priors, and whatever `fusedid_priors` names in extra_model_paths.yaml."""
    default = str(Path(folder_paths.models_dir) / "fusedid" / "priors")
    folder_paths.add_model_folder_path(PRIOR_FOLDER, default)


def guidance_choices() -> list[str]:
    """Guidance files by name, and the built-in identity Linear."""
    return [name for name in _names(GUIDANCE_FOLDER) if _is_guidance(name)] + [IDENTITY_NAME]


def prior_choices() -> list[str]:
    """Prior files by name, and the choice to go without."""
    return [*_names(PRIOR_FOLDER), NO_PRIOR]


def _names(folder: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(folder) if name.endswith(SUFFIX)]


def _is_guidance(name: str) -> bool:
    path = Path(folder_paths.get_full_path_or_raise(GUIDANCE_FOLDER, name))
    return _kind(path, path.stat().st_mtime_ns) == "guidance"


@lru_cache(maxsize=1024)
def _kind(path: Path, _modified: int) -> str | None:
    try:
        return read_header(path).kind
    except ValueError as error:
        log.warning("not listed as a guidance file: %s", error)
        return None


def open_guidance(name: str, *, context_width: int, family: str, face_width: int) -> Guidance:
    """The chosen guidance file, or the identity Linear made for this model and encoder.

    Raises ValueError when the file is absent or damaged.
    """
    if name == IDENTITY_NAME:
        return identity_linear(context_width=context_width, face_width=face_width, base=family)
    path = _existing(GUIDANCE_FOLDER, name, "guidance file")
    return _loaded(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _loaded(path: Path, _modified: int) -> Guidance:
    return load_guidance(path)


def prior_path(name: str) -> Path | None:
    """File of the chosen prior, None for `NO_PRIOR`. Raises ValueError when it is absent."""
    return None if name == NO_PRIOR else _existing(PRIOR_FOLDER, name, "prior")


def vision_weights() -> dict[str, Path]:
    """Everything in models/clip_vision by name, for the towers that only open_clip has."""
    names = folder_paths.get_filename_list(VISION_FOLDER)
    return {name: Path(folder_paths.get_full_path_or_raise(VISION_FOLDER, name)) for name in names}


def file_stamp(name: str, folder: str) -> str:
    """Changes when the file changes on disk; empty for choices that are no file."""
    path = folder_paths.get_full_path(folder, name)
    return f"{path}@{Path(path).stat().st_mtime_ns}" if path else ""


def _existing(folder: str, name: str, what: str) -> Path:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        where = ", ".join(folder_paths.get_folder_paths(folder))
        raise ValueError(f"the {what} {name!r} is not there. Put it into {where} and refresh, or choose another one")
    return Path(path)
