"""Photos on disk to square face crops: detected with a face pack, or taken whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from faces.align import whole_square
from faces.embed import WHOLE, embed_faces
from faces.encoder import FaceEncoder
from faces.pack_choice import open_encoder
from faces.picture_files import upright_rgb


def read_picture(path: Path | str) -> np.ndarray:
    """A picture file as uint8 `[H, W, 3]` RGB, upright. Raises ValueError naming the file."""
    try:
        with Image.open(path) as image:
            return np.array(upright_rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable picture ({error})") from error


def read_mask(path: Path | str) -> np.ndarray:
    """A mask file as float32 `[H, W]` in [0, 1]: white is where the person goes."""
    return np.asarray(Image.fromarray(read_picture(path)).convert("L"), dtype=np.float32) / 255.0


def open_pack(name: str, roots: Sequence[str]) -> FaceEncoder:
    """The face pack of that name below the given folders. Raises ValueError when it is not there."""
    return open_encoder(name, [Path(root).expanduser() for root in roots])


def face_crops(paths: Sequence[Path | str], encoder: FaceEncoder | None) -> tuple[np.ndarray, ...]:
    """One square crop per photo of one person. Without an encoder, or where no face is found, the whole photo."""
    pictures = [read_picture(path) for path in paths]
    if encoder is None:
        return tuple(whole_square(picture) for picture in pictures)
    found = embed_faces(pictures, encoder, policy=WHOLE)
    return tuple(reference.crop for reference in found.identity.references)
