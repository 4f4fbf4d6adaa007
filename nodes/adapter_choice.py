"""The entries of the `adapter` drop-down, and what they stand for."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .community_files import community_choices, community_fingerprint, is_community_choice
from .folders import ADAPTERS

FROM_ADAPTER = "from adapter"
TRAINING_FREE = "training-free"
OWN_PROJECTIONS = "training-free in cross-attention (experimental)"
WITHOUT_FILE = (TRAINING_FREE, OWN_PROJECTIONS)


def adapter_choices() -> list[str]:
    """Our adapters, then community files that are usable, then what needs no file."""
    ours = [name for name in folder_paths.get_filename_list(ADAPTERS) if name.endswith(".safetensors")]
    return [*ours, *community_choices(), *WITHOUT_FILE]


def adapter_path(adapter: str) -> str:
    """The file behind an entry of `models/fusedid`. Raises ValueError when it is gone."""
    path = folder_paths.get_full_path(ADAPTERS, adapter)
    if path is None:
        raise ValueError(
            f"adapter {adapter!r} is not in models/fusedid. Put the file there and refresh, or choose another"
        )
    return path


def adapter_fingerprint(adapter: str) -> str:
    """Changes when the file behind an entry does."""
    if adapter in WITHOUT_FILE:
        return adapter
    if is_community_choice(adapter):
        return community_fingerprint(adapter)
    path = folder_paths.get_full_path(ADAPTERS, adapter)
    return f"{adapter}:{Path(path).stat().st_mtime_ns}" if path else adapter
