"""Validation pictures of the guidance method: each picture drawn again from its own style and face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler

from .augment import square
from .data import collate
from .pictures import face_scores, open_scorer, side_by_side
from .source import Source
from .validation import EPOCH, on_device

if TYPE_CHECKING:
    from .guidance_task import GuidanceTask

GUIDANCE_SCALE = 5.0


@torch.no_grad()
def draw_guidance(task: GuidanceTask, source: Source, indices: Sequence[int], path: Path) -> dict[str, float]:
    """Writes original and reconstruction side by side; returns `identity` and `found` when a face pack is set."""
    pairs = []
    for number, index in enumerate(indices):
        batch = on_device(collate([task.score_draw(source, index, EPOCH)]), task.model.unet.device)
        original = square(source.picture(index), task.config.data.resolution)
        pairs.append((original, _reconstruction(task, batch, number)))
    if pairs:
        path.parent.mkdir(parents=True, exist_ok=True)
        side_by_side(pairs).save(path)
    return face_scores(pairs, open_scorer(task.config))


def _reconstruction(task: GuidanceTask, batch: dict, seed: int) -> np.ndarray:
    """Euler ancestral with classifier-free guidance against the dropped embeddings (METHOD 2.1)."""
    model, size = task.model, task.config.data.resolution
    style, face = task.embeddings(batch)
    context = torch.cat([model.guidance.null(), model.guidance(style, face)])
    added = task.added([(size, size)] * 2)
    scheduler = EulerAncestralDiscreteScheduler.from_config(task.base.pipeline.scheduler.config)
    scheduler.set_timesteps(task.config.validation.picture_steps, device=context.device)
    gen = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, size // 8, size // 8, generator=gen).to(context.device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        with torch.autocast(context.device.type, dtype=torch.bfloat16, enabled=model.unet.dtype != torch.float32):
            out = model.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]
        without, with_guidance = out.float().chunk(2)
        prediction = without + GUIDANCE_SCALE * (with_guidance - without)
        latents = scheduler.step(prediction, t, latents, generator=gen, return_dict=False)[0]
    pixels = task.base.vae.decode(latents / task.base.vae.config.scaling_factor, return_dict=False)[0]
    return np.asarray(task.base.pipeline.image_processor.postprocess(pixels)[0])
