"""Where users keep our files. Registered with the host, so that `extra_model_paths.yaml` works."""

from __future__ import annotations

from pathlib import Path

import folder_paths

ADAPTERS = "fusedid"
IDENTITIES = "identities"
INSIGHTFACE = "insightface"


def register_folders() -> None:
    """Adds `models/fusedid`, `models/identities`, segmentation models and the folders community adapters live in."""
    from .community_files import register_community_folders
    from .guidance_files import register_prior_folder
    from .segmentation_files import register_segmentation_folder

    for name in (ADAPTERS, IDENTITIES):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
    register_prior_folder()
    register_segmentation_folder()
    register_community_folders()


def insightface_roots() -> list[Path]:
    """Folders that hold `models/<pack>/*.onnx`: what the user registered, then `models/insightface`."""
    registered = folder_paths.folder_names_and_paths.get(INSIGHTFACE, ([], set()))[0]
    roots = [Path(path) for path in registered] + [Path(folder_paths.models_dir) / INSIGHTFACE]
    return list(dict.fromkeys(roots))
