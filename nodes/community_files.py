"""Community adapters in the folders users already have, listed by what they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import folder_paths

from ..attention.community.container import open_community
from ..attention.community.eva_clip import EvaTower, is_eva_tower, load_eva_tower
from ..attention.community.recognise import Recognised
from ..attention.community.source import CommunityAdapter, inspect_community, load_community

FOLDERS = ("ipadapter", "instantid", "pulid")
"""What IPAdapter_plus, InstantID and PuLID_ComfyUI registered, so that their users' files and paths are found."""
EVA_FOLDERS = ("clip_vision", "pulid")


def register_community_folders() -> None:
    """Adds the folders for users who have none of those packs; paths that others registered stay first."""
    for name in FOLDERS:
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))


def community_choices() -> list[str]:
    """Drop-down entries `<folder>/<file>` of files that are usable; strangers in these folders are left out."""
    entries = (f"{folder}/{name}" for folder in FOLDERS for name in folder_paths.get_filename_list(folder))
    return [entry for entry in entries if recognised_choice(entry) is not None]


def recognised_choice(choice: str) -> Recognised | None:
    """What the file behind an entry is, or None when it cannot be used."""
    try:
        return _inspect(*_file_key(community_path(choice)))
    except ValueError:
        return None


def is_community_choice(choice: str) -> bool:
    """Whether a drop-down entry names a file in one of the community folders."""
    return choice.partition("/")[0] in FOLDERS and "/" in choice


def community_path(choice: str) -> Path:
    """The file behind a drop-down entry. Raises ValueError when it is gone."""
    folder, _, name = choice.partition("/")
    path = folder_paths.get_full_path(folder, name) if folder in FOLDERS else None
    if path is None:
        raise ValueError(f"{choice} is not there any more; put it back into models/{folder}, or choose another adapter")
    return Path(path)


def load_community_choice(choice: str, variant: str) -> CommunityAdapter:
    """The adapter behind an entry; the last two stay loaded. Raises ValueError that says what the file is instead."""
    return _load(*_file_key(community_path(choice)), variant)


def load_eva() -> EvaTower | None:
    """PuLID's EVA-CLIP tower from `models/clip_vision` or `models/pulid`, or where PuLID_ComfyUI downloaded it to."""
    path = next((path for path in _eva_candidates() if path.is_file() and _is_eva(*_file_key(path))), None)
    return None if path is None else _load_eva(*_file_key(path))


def _eva_candidates() -> Iterator[Path]:
    for folder in EVA_FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            if (path := folder_paths.get_full_path(folder, name)) is not None:
                yield Path(path)
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub"
    yield from sorted(hub.glob("models--QuanSun--EVA-CLIP/snapshots/*/EVA02_CLIP_L_336*.pt"))


def community_fingerprint(choice: str) -> str:
    """Changes when the file does."""
    return ":".join(str(part) for part in _file_key(community_path(choice)))


def _file_key(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=256)
def _inspect(path: str, _mtime: int, _size: int) -> Recognised | None:
    try:
        return inspect_community(path)
    except ValueError:
        return None


@lru_cache(maxsize=64)
def _is_eva(path: str, _mtime: int, _size: int) -> bool:
    try:
        return is_eva_tower(open_community(path).shapes)
    except ValueError:
        return False


@lru_cache(maxsize=1)
def _load_eva(path: str, _mtime: int, _size: int) -> EvaTower:
    return load_eva_tower(path)


@lru_cache(maxsize=2)
def _load(path: str, _mtime: int, _size: int, variant: str) -> CommunityAdapter:
    return load_community(path, variant=variant)
