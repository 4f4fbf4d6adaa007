"""FusedIDFaceFolder: the pictures of a folder one by one; whatever follows runs once for each."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import numpy as np
from comfy_api.v0_0_2 import io
from PIL import Image

from ..faces.picture_files import upright_rgb
from ..faces.pictures import as_rgb
from .images import pictures_to_image
from .input_ranges import require_in_range

NODE = "FusedIDFaceFolder"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NO_FOLDER = "(make a folder in input)"


class FaceFolder(io.ComfyNode):
    """Translator from widgets to `read_pictures`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDFaceFolder",
            display_name="Load Faces from Folder",
            category="FusedID",
            description=(
                "Hands out the pictures of a folder in input one by one, in the order of their names: Face Embed and "
                "everything after it run once per picture. For several photos of ONE person use a batch instead."
            ),
            inputs=[
                io.Combo.Input(
                    "folder", options=folder_paths.get_input_subfolders() or [NO_FOLDER],
                    tooltip="A folder inside ComfyUI's input folder; its own folders are not entered.",
                ),
                io.Int.Input(
                    "first", default=1, min=1, max=1_000_000,
                    tooltip="The picture to begin with, from 1: to go on where an earlier run ended.",
                ),
                io.Int.Input(
                    "count", default=0, min=0, max=1_000_000,
                    tooltip="How many pictures are taken. 0: all. They are all in memory at once: about 12 MB per "
                    "megapixel.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="One picture at a time."),
                io.String.Output(
                    display_name="names", is_output_list=True,
                    tooltip="Its file name without ending: for Face Embed's name and Save Image's prefix.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        return _problem(folder) or True

    @classmethod
    def fingerprint_inputs(cls, folder: str, first: int, count: int) -> str:
        """Pictures that were added, changed or removed are read again."""
        if _problem(folder):
            return folder
        files = chosen_files(_place(folder), first=first, count=count)
        return "\n".join(f"{file.name} {file.stat().st_mtime_ns}" for file in files)

    @classmethod
    def execute(cls, folder: str, first: int, count: int) -> io.NodeOutput:
        try:
            require_in_range(cls, {"first": first, "count": count})
            if problem := _problem(folder):
                raise ValueError(problem)
            files = chosen_files(_place(folder), first=first, count=count)
            pictures = [pictures_to_image([read_picture(file)]) for file in files]
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
        return io.NodeOutput(pictures, [file.stem for file in files])


def chosen_files(folder: Path, *, first: int, count: int) -> list[Path]:
    """`count` picture files of a folder (0: all) from number `first` on, by name. ValueError when there are none."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    chosen = files[first - 1 : first - 1 + count] if count else files[first - 1 :]
    if not chosen:
        raise ValueError(
            f"the folder {folder.name!r} has {len(files)} pictures ({', '.join(SUFFIXES)}), none of them from number "
            f"{first} on. Choose another folder or a smaller first"
        )
    return chosen


def read_picture(file: Path) -> np.ndarray:
    """uint8 `[H, W, 3]`, turned upright as its camera noted. ValueError that names the file when it is no picture."""
    try:
        with Image.open(file) as picture:
            return as_rgb(np.array(upright_rgb(picture)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
        raise ValueError(f"{file.name} cannot be read ({error}). Remove it from the folder, or save it anew") from error


def _place(folder: str) -> Path:
    return Path(folder_paths.get_input_directory()) / folder


def _problem(folder: str) -> str | None:
    if folder in folder_paths.get_input_subfolders():
        return None
    return f"there is no folder {folder!r} in {folder_paths.get_input_directory()}; make it, or choose another"
