"""Draws the pictures that are not there yet; every file says what it was made from, so a stopped run goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from training.augment import square, to_rgb_pm1
from training.base import BaseModel
from training.draw import DrawOptions
from training.references import Person
from training.sample import Studio

from .config import THROUGH_VAE, TRAINING_FREE, WITHOUT, RowConfig
from .plan import Job, Row

logger = logging.getLogger("fusedid")
KEY, SECONDS = "fusedid.key", "fusedid.seconds"


def draw_row(studio: Studio, row: Row, jobs: Sequence[Job], adapter: str, *, batch: int, size: int) -> int:
    """Draws what is missing of a row and returns how many pictures that were.

    adapter: path of its file, or what stands for one. size: side of the references where no adapter file says it.
    Raises ValueError when the adapter does not fit the base model.
    """
    missing = [job for job in jobs if not is_drawn(job)]
    if not missing:
        return 0
    ready = with_row(studio, row.config, adapter, size=size)
    for some in _batches(missing, batch):
        start = time.perf_counter()
        if row.config.adapter == THROUGH_VAE:
            pictures = [through_vae(ready.base, job, row.options) for job in some]
        else:
            pictures = ready.draw_shots([job.shot for job in some], row.options)
        seconds = (time.perf_counter() - start) / len(some)
        for job, picture in zip(some, pictures):
            write_picture(job, picture, seconds)
        logger.info("%s: %d of %d pictures, %.1f s each", row.name, _done(jobs), len(jobs), seconds)
    return len(missing)


def with_row(studio: Studio, row: RowConfig, adapter: str, *, size: int) -> Studio:
    """The studio with the row's adapter and overrides in place. Raises ValueError when it does not fit the base."""
    if adapter in (WITHOUT, THROUGH_VAE):
        adapter = TRAINING_FREE  # nothing is shown, so that its projections are never used
    ready = studio.with_adapter(adapter, reference_size=size)
    chosen = row.model_dump(include={"combine", "timestep", "length"}, exclude_none=True)
    ready.model.settings = replace(ready.model.settings, **chosen)
    return ready


@torch.no_grad()
def through_vae(base: BaseModel, job: Job, options: DrawOptions) -> Image.Image:
    """The first reference, encoded and decoded at the picture's size (its shorter side)."""
    side = min(options.width, options.height)
    crop = square(job.shown[0].photos[0].crop, side)
    latents = base.encode(to_rgb_pm1(crop)[None].to(base.vae.device))
    pixels = base.vae.decode(latents.to(base.vae.dtype) / base.vae.config.scaling_factor, return_dict=False)[0]
    return base.pipeline.image_processor.postprocess(pixels)[0]


def is_drawn(job: Job) -> bool:
    """Whether the picture is there and was made from the same things."""
    return _note(job.path, KEY) == job.key


def seconds_of(job: Job) -> float | None:
    """How long the picture took, a batch's time shared equally; None for pictures drawn elsewhere."""
    text = _note(job.path, SECONDS)
    return float(text) if text else None


def read_drawn(job: Job) -> np.ndarray:
    """The picture, uint8 `[H, W, 3]`."""
    with Image.open(job.path) as image:
        return np.array(image.convert("RGB"))


def write_picture(job: Job, picture: Image.Image, seconds: float) -> None:
    """Writes the PNG at once or not at all, with key and time in it."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text(KEY, job.key)
    notes.add_text(SECONDS, f"{seconds:.4f}")
    job.path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = job.path.with_suffix(".unfinished")
    picture.save(unfinished, "PNG", pnginfo=notes)
    unfinished.replace(job.path)


def time_references(studio: Studio, people: Person, options: DrawOptions, *, repeats: int) -> list[float]:
    """Seconds of `repeats` single pictures of one person, after one that is not counted."""
    seconds = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        studio.draw([people], replace(options, seed=number))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _note(path: Path, name: str) -> str | None:
    try:
        with Image.open(path) as image:
            return image.info.get(name)
    except OSError:
        return None


def _batches(jobs: Sequence[Job], batch: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(jobs), batch):
        yield jobs[start : start + batch]


def _done(jobs: Sequence[Job]) -> int:
    return sum(job.path.is_file() for job in jobs)
