"""The person segmentation model on disk that turns heads into bodies."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..faces.people import PersonSegmenter, open_segmenter

FOLDER = "fusedid_segmentation"
SUFFIX = ".onnx"
EXAMPLE = "selfie_segmentation_landscape.onnx"


def register_segmentation_folder() -> None:
    """models/fusedid/segmentation, and whatever `fusedid_segmentation` names in extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / "fusedid" / "segmentation"))


def load_segmenter() -> PersonSegmenter:
    """The one model in the folder. Raises ValueError, naming the folder, when there is none or more than one."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    files = sorted(file for folder in folders for file in folder.glob(f"*{SUFFIX}"))
    if not files:
        raise ValueError(
            f"region 'body' needs a person segmentation model, and there is no {SUFFIX} file in "
            f"{' or '.join(map(str, folders))}. Put one there, such as MediaPipe's {EXAMPLE} (Apache-2.0, 0.5 MB), or "
            "choose region 'head'"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{len(files)} person segmentation models are in {folders[0]}: {names}. Leave only one there")
    return open_segmenter(files[0])
