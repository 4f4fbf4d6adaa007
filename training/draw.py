"""Pictures from faces, a prompt and a `FusedUNet`, through diffusers' own pipeline: the reference without ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler
from PIL import Image

from attention.fusion import PAPER, FaceControls
from attention.grid import LATENT_SCALE
from attention.routing import Background, Overlap, resolve_overlaps

from .base import BaseModel
from .processors import FaceCall
from .references import Person, ReferenceText, make_references, noised, stack_references
from .unet import FusedUNet, Reference


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """What a picture depends on besides the faces."""

    prompt: str = ""
    negative: str = ""
    width: int = 512
    height: int = 512
    steps: int = 25
    guidance_scale: float = 7.0
    seed: int = 0
    count: int = 1
    controls: FaceControls = PAPER
    background: Background = "all"
    overlap: Overlap = "larger value"
    soft: bool = False
    apply_to_both: bool = False
    """Show the faces to the negative prompt's rows too."""


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture of a batch: who is shown, what the prompt says, and the seed of its noise."""

    people: Sequence[Person]
    prompt: str
    seed: int


def draw(
    base: BaseModel,
    model: FusedUNet | None,
    people: Sequence[Person],
    options: DrawOptions,
    *,
    reference_text: ReferenceText = None,
) -> list[Image.Image]:
    """`options.count` Euler ancestral pictures of the same people. Nobody needs no model but the base.

    Raises ValueError when some people have a mask and others have none.
    """
    shots = [Shot(people, options.prompt, options.seed + number) for number in range(options.count)]
    return draw_shots(base, model, shots, options, reference_text=reference_text)


def draw_shots(
    base: BaseModel,
    model: FusedUNet | None,
    shots: Sequence[Shot],
    options: DrawOptions,
    *,
    reference_text: ReferenceText = None,
) -> list[Image.Image]:
    """One Euler ancestral picture per shot, all in one batch; prompt, seed and count of `options` are not read.

    Every shot needs the same number of people and references, and the first shot's masks hold for all. A picture is
    the same in any batch, up to rounding. Raises ValueError when the shots do not fit together.
    """
    pipeline = base.pipeline
    kept = pipeline.scheduler
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(kept.config)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with _faces_shown(base, model, shots, options, reference_text):
            return _run(pipeline, shots, options)
    finally:
        pipeline.scheduler = kept


@torch.no_grad()
def _run(pipeline: Any, shots: Sequence[Shot], options: DrawOptions) -> list[Image.Image]:
    latents = pipeline(
        [shot.prompt for shot in shots],
        negative_prompt=[options.negative] * len(shots),
        width=options.width,
        height=options.height,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=[torch.Generator().manual_seed(shot.seed) for shot in shots],
        output_type="latent",
    ).images
    pixels = pipeline.vae.decode(latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor, return_dict=False)
    return pipeline.image_processor.postprocess(pixels[0])


@contextmanager
def _faces_shown(
    base: BaseModel, model: FusedUNet | None, shots: Sequence[Shot], options: DrawOptions, reference_text: ReferenceText
) -> Iterator[None]:
    """Within the block every call of the UNet sees the faces; a hook computes them once, or per step for `matched`."""
    people = shots[0].people
    if not any(shot.people for shot in shots) or options.controls.strength == 0:
        yield
        return
    assert model is not None, "faces need the model that attends to them"
    both = options.apply_to_both and options.guidance_scale > 1
    references = _references(base, model, [*shots, *shots] if both else shots, reference_text)
    regions = _regions(model, people, options)
    noise = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    known: dict[int, FaceCall] = {}

    def call_at(timestep: int) -> FaceCall:
        key = timestep if model.settings.timestep == "matched" else 0
        if key not in known:
            known.clear()
            shown = references if key == 0 else [noised(reference, noise, key) for reference in references]
            keys = model.face_keys(shown)
            known[key] = FaceCall(keys, regions=regions, controls=options.controls, combine=model.settings.combine)
        return known[key]

    def show(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if named.get("cross_attention_kwargs"):  # the reference pass itself
            return arguments, named
        rows = arguments[0].shape[0]
        split = options.guidance_scale > 1 and not options.apply_to_both
        call = call_at(round(float(arguments[1])))
        if split:  # the pipeline puts the negative prompt's rows first
            call = replace(call, rows=torch.arange(rows // 2, rows), others=torch.arange(rows // 2))
        return arguments, {**named, "cross_attention_kwargs": {"faces": call}}

    handle = model.unet.register_forward_pre_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _references(
    base: BaseModel, model: FusedUNet, shots: Sequence[Shot], reference_text: ReferenceText
) -> list[Reference]:
    """One row where all shots show the same, else one row per shot."""
    first = shots[0]
    same_text = model.settings.text != "positive" or all(shot.prompt == first.prompt for shot in shots)
    if same_text and all(shot.people is first.people for shot in shots):
        return make_references(base, model, first.people, first.prompt, reference_text)
    return stack_references([make_references(base, model, shot.people, shot.prompt, reference_text) for shot in shots])


def _regions(model: FusedUNet, people: Sequence[Person], options: DrawOptions) -> Any:
    masks = [person.mask for person in people if person.mask is not None]
    if not masks:
        return None
    if len(masks) != len(people):
        raise ValueError(f"{len(people)} people but {len(masks)} masks; give one mask per person, or none at all")
    same = torch.from_numpy(np.stack([_sized(mask, options) for mask in masks])).clamp(0, 1)
    latent = (options.height // LATENT_SCALE, options.width // LATENT_SCALE)
    return model.regions(
        resolve_overlaps(same, options.overlap), latent, background=options.background, soft=options.soft
    )


def _sized(mask: np.ndarray, options: DrawOptions) -> np.ndarray:
    """A mask at the picture's size."""
    picture = Image.fromarray(mask.astype(np.float32))
    return np.asarray(picture.resize((options.width, options.height), Image.Resampling.BILINEAR))
