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
from torch import Tensor

from attention.fusion import PAPER, FaceControls
from attention.grid import LATENT_SCALE
from attention.routing import Background, Overlap, resolve_overlaps

from .augment import square, to_rgb_pm1
from .base import BaseModel
from .processors import FaceCall
from .randomness import generator
from .text import context_for
from .unet import FusedUNet, Reference, TextContext


@dataclass(frozen=True, eq=False)
class Person:
    """Square face crops of one person (uint8 `[S, S, 3]`), a weight for each, and where the person goes.

    mask: float `[H, W]` in [0, 1], any size; None when nobody is routed.
    """

    crops: tuple[np.ndarray, ...]
    weights: tuple[float, ...] = ()
    mask: np.ndarray | None = None


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


def draw(
    base: BaseModel,
    model: FusedUNet,
    people: Sequence[Person],
    options: DrawOptions,
    *,
    reference_text: tuple[Tensor, Tensor | None] | None = None,
) -> list[Image.Image]:
    """Euler ancestral pictures. `reference_text`: tokens `[T, D_c]` and pooled of the reference pass; None encodes ''.

    Raises ValueError when some people have a mask and others have none.
    """
    pipeline = base.pipeline
    kept = pipeline.scheduler
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(kept.config)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with _faces_shown(base, model, people, options, reference_text):
            return _run(pipeline, options)
    finally:
        pipeline.scheduler = kept


@torch.no_grad()
def _run(pipeline: Any, options: DrawOptions) -> list[Image.Image]:
    seeds = [torch.Generator().manual_seed(options.seed + i) for i in range(options.count)]
    latents = pipeline(
        options.prompt,
        negative_prompt=options.negative,
        width=options.width,
        height=options.height,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        num_images_per_prompt=options.count,
        generator=seeds,
        output_type="latent",
    ).images
    pixels = pipeline.vae.decode(latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor, return_dict=False)
    return pipeline.image_processor.postprocess(pixels[0])


@contextmanager
def _faces_shown(
    base: BaseModel,
    model: FusedUNet,
    people: Sequence[Person],
    options: DrawOptions,
    reference_text: tuple[Tensor, Tensor | None] | None,
) -> Iterator[None]:
    """Within the block every call of the UNet sees the faces; a hook computes them once, or per step for `matched`."""
    if not people or options.controls.strength == 0:
        yield
        return
    references = make_references(base, model, people, options, reference_text)
    regions = _regions(model, people, options)
    noise = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    known: dict[int, FaceCall] = {}

    def call_at(timestep: int) -> FaceCall:
        key = timestep if model.settings.timestep == "matched" else 0
        if key not in known:
            known.clear()
            shown = references if key == 0 else [_noised(reference, noise, key) for reference in references]
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


def make_references(
    base: BaseModel,
    model: FusedUNet,
    people: Sequence[Person],
    options: DrawOptions,
    reference_text: tuple[Tensor, Tensor | None] | None = None,
) -> list[Reference]:
    """Every crop of every person as the reference pass takes it: its VAE mean at the adapter's reference size."""
    size = model.settings.reference_size
    context = _reference_context(base, model, options, reference_text, size)
    found = []
    for identity, person in enumerate(people):
        weights = person.weights or (1.0,) * len(person.crops)
        shown = [(crop, weight) for crop, weight in zip(person.crops, weights) if weight > 0]
        total = sum(weight for _, weight in shown)
        for crop, weight in shown:
            pixels = to_rgb_pm1(square(crop, size))[None].to(base.vae.device)
            latents = base.encode(pixels).to(model.unet.dtype)
            found.append(Reference(latents, context, identity=identity, weight=weight * len(shown) / total))
    return found


def _reference_context(
    base: BaseModel,
    model: FusedUNet,
    options: DrawOptions,
    reference_text: tuple[Tensor, Tensor | None] | None,
    size: int,
) -> TextContext:
    if model.settings.text == "positive":
        tokens, pooled = base.prompts([options.prompt])
    elif reference_text is not None:
        tokens, pooled = (None if t is None else t[None].to(model.unet.device) for t in reference_text)
    else:
        tokens, pooled = base.prompts([""])
    assert tokens is not None
    kind = model.unet.dtype
    return context_for(tokens.to(kind), None if pooled is None else pooled.to(kind), [(size, size)], size)


def _noised(reference: Reference, noise: Any, timestep: int) -> Reference:
    """The reference at the noise level of a step; its noise never changes (METHOD 1.2 `matched`)."""
    drawn = torch.randn(reference.latents.shape, generator=generator("reference", reference.identity))
    at = torch.full((len(drawn),), timestep, dtype=torch.long, device=reference.latents.device)
    latents = noise.add_noise(reference.latents, drawn.to(reference.latents), at)
    return replace(reference, latents=latents, timesteps=at)


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
