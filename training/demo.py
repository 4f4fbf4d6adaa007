"""The demo without ComfyUI: a real face through the shipped miniature, one sheet of pictures, similarity where known.

`python dev.py demo` runs it. Everything it needs comes with the code or from the package registry: the photo is NASA's
portrait of Eileen Collins from scikit-image (public domain), whose own detector finds the face where no face pack is on
disk; the second person of the routed picture is one that the miniature made up.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attention.fusion import FaceControls
from faces.align import crop_square
from faces.embed import WHOLE, embed_faces
from faces.encoder import FaceEncoder
from faces.packs import find_packs

from .config import ModelConfig
from .draw import DrawOptions
from .miniature import ADAPTER_PREFIX, BASE_FILE, SHIPPED, SIDE
from .people import open_pack, read_picture
from .pictures import likeness
from .references import Person
from .sample import Studio, open_studio

logger = logging.getLogger("fusedid")
VALUE_STRENGTHS = (0.25, 0.5, 1.0)
"""Not `strength`, the share of the softmax: with nothing but zeros as text, nothing competes with the face keys."""
PAD, LABEL, SHOWN = 12, 34, 224
STRANGER_SEED = 1000


@dataclass(frozen=True)
class Panel:
    """A picture of the sheet and what stands beneath it."""

    picture: np.ndarray
    label: str


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="dev.py demo", description="A real face through the shipped miniature.")
    made.add_argument("--photo", type=Path, help="a photo with a face (default: the astronaut of scikit-image)")
    made.add_argument("--made-up", type=int, metavar="SEED", help="show a person that the miniature makes up instead")
    made.add_argument("--out", type=Path, default=Path("demo"), help="folder for the sheet (default: demo)")
    made.add_argument("--weights", type=Path, default=SHIPPED, help="folder of the miniature's files")
    made.add_argument(
        "--face-pack", help="face pack that finds the face and scores the pictures (default: what is found)"
    )
    made.add_argument("--face-pack-root", type=Path, action="append", default=[], help="folder with models/<pack>")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--steps", type=int, default=25)
    made.add_argument("--guidance-scale", type=float, default=2.0)
    return made


def make_sheet(options: argparse.Namespace) -> tuple[Path, str]:
    """Draws and writes the sheet; returns its path and the report. Raises ValueError where the user can help."""
    started = time.monotonic()
    encoder = open_scorer(options)
    base, adapter = options.weights / BASE_FILE, options.weights / f"{ADAPTER_PREFIX}fused.safetensors"
    studio = open_studio(ModelConfig(base=str(base)), str(adapter))
    if options.made_up is not None:
        face = np.asarray(studio.draw([], replace(plain_options(options), seed=options.made_up))[0])
    else:
        face = found_face(astronaut() if options.photo is None else read_picture(options.photo), encoder)
    panels = sheet_panels(studio, face, encoder, options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "miniature.png"
    sheet(panels).save(path)
    scored = (
        "" if encoder else "\nNo face pack was found, so likeness was not measured; name one with --face-pack-root."
    )
    lines = "\n".join(f"  {panel.label}" for panel in panels)
    return path, f"{lines}\n{time.monotonic() - started:.0f} s{scored}"


def sheet_panels(
    studio: Studio, face: np.ndarray, encoder: FaceEncoder | None, options: argparse.Namespace
) -> list[Panel]:
    """Reference, without identity, with identity at three strengths, two people routed by masks."""
    plain = plain_options(options)
    person = Person((face,))
    panels = [Panel(face, "reference")]
    nobody = np.asarray(studio.draw([], plain)[0])
    panels.append(Panel(nobody, scored("without identity", face, nobody, encoder)))
    for strength in VALUE_STRENGTHS:
        drawn = studio.draw([person], replace(plain, controls=FaceControls(value_strength=strength)))
        picture = np.asarray(drawn[0])
        panels.append(Panel(picture, scored(f"value strength {strength:g}", face, picture, encoder)))
    stranger = np.asarray(studio.draw([], replace(plain, seed=options.seed + STRANGER_SEED))[0])
    panels.append(Panel(stranger, "a made-up person"))
    left, right = bands(SIDE, 2)
    two = [replace(person, mask=left), Person((stranger,), mask=right)]
    both = np.asarray(studio.draw(two, replace(plain, width=2 * SIDE))[0])
    panels.append(Panel(both, scored("both, routed by masks", face, both[:, :SIDE], encoder)))
    return panels


def plain_options(options: argparse.Namespace) -> DrawOptions:
    """One person's picture, without anybody in particular."""
    return DrawOptions(
        width=SIDE, height=SIDE, steps=options.steps, guidance_scale=options.guidance_scale, seed=options.seed
    )


def bands(side: int, count: int) -> list[np.ndarray]:
    """Masks float32 `[side, count * side]` that give every person an equal upright band."""
    masks = [np.zeros((side, count * side), dtype=np.float32) for _ in range(count)]
    for number, mask in enumerate(masks):
        mask[:, number * side : (number + 1) * side] = 1
    return masks


def scored(label: str, face: np.ndarray, picture: np.ndarray, encoder: FaceEncoder | None) -> str:
    """The label with the cosine between the two faces, where it can be measured."""
    if encoder is None:
        return label
    cosine = likeness(face, picture, encoder)
    return f"{label}: no face found" if cosine is None else f"{label}: {cosine:.2f}"


def astronaut() -> np.ndarray:
    """NASA's portrait of Eileen Collins, uint8 `[512, 512, 3]`."""
    from skimage.data import astronaut as picture

    return np.asarray(picture())


def found_face(photo: np.ndarray, encoder: FaceEncoder | None) -> np.ndarray:
    """The square crop of the largest face. Without a face pack scikit-image's cascade finds it.

    Raises ValueError when the cascade finds none.
    """
    if encoder is not None:
        return embed_faces([photo], encoder, policy=WHOLE).identity.references[0].crop
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    smallest = max(24, min(photo.shape[:2]) // 12)
    seen = Cascade(lbp_frontal_face_cascade_filename()).detect_multi_scale(
        photo, scale_factor=1.2, step_ratio=1, min_size=(smallest, smallest), max_size=photo.shape[:2]
    )
    if not seen:
        raise ValueError(
            "scikit-image's simple detector finds no face in the photo; take one that looks into the camera, or name a "
            "folder with a face pack with --face-pack-root"
        )
    best = max(seen, key=lambda box: box["width"])
    # The cascade's square covers brows to chin and both cheeks: a little narrower than a detector's box is high.
    left, top = float(best["c"]), float(best["r"])
    return crop_square(photo, (left, top, left + best["width"], top + best["height"]))[0]


def open_scorer(options: argparse.Namespace) -> FaceEncoder | None:
    """The named face pack, or the first one that is on disk; None when there is none."""
    roots = options.face_pack_root or [Path("models/insightface"), Path("~/.insightface").expanduser()]
    names = [options.face_pack] if options.face_pack else [pack.name for pack in find_packs(roots)]
    return open_pack(names[0], [str(root) for root in roots]) if names else None


def sheet(panels: Sequence[Panel]) -> Image.Image:
    """The panels side by side, twice two rows high where they would get too wide, labels beneath."""
    rows = [panels[:5], panels[5:]]
    font = ImageFont.load_default(16)
    width = PAD + max(sum(_width(panel) + PAD for panel in row) for row in rows)
    made = Image.new("RGB", (width, len(rows) * (SHOWN + LABEL + PAD) + PAD), "white")
    pen = ImageDraw.Draw(made)
    for number, row in enumerate(rows):
        x, y = PAD, PAD + number * (SHOWN + LABEL + PAD)
        for panel in row:
            size = (_width(panel), SHOWN)
            made.paste(Image.fromarray(panel.picture).resize(size, Image.Resampling.LANCZOS), (x, y))
            pen.text((x, y + SHOWN + 6), panel.label, fill="black", font=font)
            x += size[0] + PAD
    return made


def _width(panel: Panel) -> int:
    height, width = panel.picture.shape[:2]
    return round(SHOWN * width / height)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        path, report = make_sheet(parser().parse_args(arguments))
    except ValueError as error:
        logger.error("%s", error)
        return 2
    sys.stdout.write(f"{report}\nSheet: {path.resolve()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
