"""`python -m training.sample`: faces, a prompt and an adapter file to pictures, without ComfyUI.

    python -m training.sample --base models/sd15 --adapter runs/fusion/adapter.safetensors \\
        --face anna1.jpg anna2.jpg --mask left.png --face ben.jpg --mask right.png \\
        --prompt "two people at a table" --out picture.png
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image

from attention.adapter import AdapterSettings, load_adapter
from attention.fusion import FaceControls
from attention.routing import BACKGROUNDS, OVERLAPS

from .base import BaseModel, load_base
from .config import ModelConfig
from .draw import DrawOptions, Shot, draw, draw_shots
from .people import face_crops, open_pack, read_mask
from .references import Person, ReferenceText
from .unet import FusedUNet

logger = logging.getLogger("fusedid")
TRAINING_FREE = "training-free"


@dataclass(frozen=True, eq=False)
class Studio:
    """A base model with an adapter in place, ready to draw."""

    base: BaseModel
    model: FusedUNet
    reference_text: ReferenceText

    def draw(self, people: Sequence[Person], options: DrawOptions) -> list[Image.Image]:
        """`options.count` pictures of the same people."""
        return draw(self.base, self.model, people, options, reference_text=self.reference_text)

    def draw_shots(self, shots: Sequence[Shot], options: DrawOptions) -> list[Image.Image]:
        """One picture per shot, in one batch."""
        return draw_shots(self.base, self.model, shots, options, reference_text=self.reference_text)

    def with_adapter(self, adapter: str, *, reference_size: int = 512) -> Studio:
        """The same loaded base with another adapter, a file or `training-free`; this studio draws with it too from now.

        Raises ValueError when the adapter is for another family; the adapter that was there is gone then too.
        """
        self.model.settings = AdapterSettings(base=self.base.family, reference_size=reference_size)
        self.model.reset_projections()
        if adapter == TRAINING_FREE:
            return Studio(self.base, self.model, None)
        loaded = load_adapter(adapter)
        self.model.load_adapter(loaded, name=Path(adapter).name)
        text = None if loaded.prompt_context is None else (loaded.prompt_context, loaded.prompt_pooled)
        return Studio(self.base, self.model, text)


def open_studio(
    model: ModelConfig,
    adapter: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    reference_size: int = 512,
) -> Studio:
    """Loads base and adapter file. `training-free` uses the base's own self-attention at `reference_size` pixels.

    Raises ValueError when the adapter is for another family.
    """
    base = load_base(model)
    fused = FusedUNet(base.unet, AdapterSettings(base=base.family, reference_size=reference_size)).eval()
    studio = Studio(base, fused, None).with_adapter(adapter, reference_size=reference_size)
    fused.to(device, dtype)
    base.prompts.to(device, dtype)
    base.vae.to(device)
    return studio


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m training.sample", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    made.add_argument("--base", required=True, help="diffusers folder or .safetensors checkpoint")
    made.add_argument("--base-config", help="diffusers folder for the config of a .safetensors base, without network")
    made.add_argument("--adapter", default=TRAINING_FREE, help="adapter file (default: training-free)")
    made.add_argument("--face", nargs="+", action="append", required=True, help="photos of one person; once per person")
    made.add_argument("--mask", action="append", default=[], help="where the person goes; once per person, in order")
    made.add_argument("--face-pack", help="find the faces with this pack (default: photos are face crops already)")
    made.add_argument("--face-root", action="append", default=[], help="folder with models/<pack>")
    made.add_argument("--prompt", default="")
    made.add_argument("--negative", default="")
    made.add_argument("--out", default="picture.png", help="file; with --count a number is appended")
    made.add_argument("--width", type=int, default=512)
    made.add_argument("--height", type=int, default=512)
    made.add_argument("--steps", type=int, default=25)
    made.add_argument("--guidance-scale", type=float, default=7.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--count", type=int, default=1)
    made.add_argument("--strength", type=float, default=1.0, help="0 is the base model, 1 the paper")
    made.add_argument("--background", choices=BACKGROUNDS, default="all")
    made.add_argument("--overlap", choices=OVERLAPS, default="larger value")
    made.add_argument("--soft", action="store_true", help="soft mask borders")
    made.add_argument("--reference-size", type=int, default=512, help="for training-free only")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def sample(options: argparse.Namespace) -> list[Path]:
    """Draws and writes the pictures; returns their paths. Raises ValueError for what the user can put right."""
    people, masks = len(options.face), len(options.mask)
    if masks not in (0, people):
        raise ValueError(f"{people} people (--face) but {masks} masks; give one --mask per person, or none")
    for name in ("width", "height"):
        if getattr(options, name) % 8 or getattr(options, name) < 64:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be a multiple of 8, at least 64")
    roots = options.face_root or ["models/insightface", "~/.insightface"]
    encoder = open_pack(options.face_pack, roots) if options.face_pack else None
    shown = [
        Person(face_crops(paths, encoder), mask=read_mask(mask) if mask else None)
        for paths, mask in zip_longest(options.face, options.mask)
    ]
    studio = open_studio(
        ModelConfig(base=options.base, config=options.base_config),
        options.adapter,
        device=options.device,
        dtype=torch.float16 if options.device.startswith("cuda") else torch.float32,
        reference_size=options.reference_size,
    )
    pictures = studio.draw(shown, _draw_options(options))
    paths = _names(Path(options.out), len(pictures))
    for path, picture in zip(paths, pictures):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return paths


def _draw_options(options: argparse.Namespace) -> DrawOptions:
    taken = ("prompt", "negative", "width", "height", "steps", "guidance_scale", "seed", "count")
    routing = ("background", "overlap", "soft")
    controls = FaceControls(strength=options.strength)
    return DrawOptions(controls=controls, **{name: getattr(options, name) for name in (*taken, *routing)})


def _names(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{number:02d}{path.suffix}") for number in range(count)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        for path in sample(parser().parse_args(arguments)):
            logger.info("wrote %s", path)
    except ValueError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
