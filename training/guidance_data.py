"""Guidance samples: a target, its own picture with the face hidden as style, and the face's embedding (METHOD 2.5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention.guidance_style import hide_region

from .augment import square, to_rgb01, to_rgb_pm1
from .config import TrainConfig
from .data import Sample, cached_moments, noises, picture_variant
from .randomness import generator, uniform
from .source import Source


class GuidanceDraw:
    """Makes the samples of METHOD 2.5. `face_width`: numbers per face embedding."""

    def __init__(self, config: TrainConfig, face_width: int) -> None:
        self.config = config
        self.face_width = face_width

    def __call__(self, source: Source, index: int, epoch: int) -> Sample:
        """A sample with

        `pixels` `[3, H, W]` in [-1, 1] or `moments` `[8, h, w]`; `picture_id`, equal where the pictures are;
        `vae_noise`, `noise` `[4, h, w]`; `timestep`; `style_pixels` `[H, W, 3]` in [0, 1] or `style` `[S]`, where the
        run reads styles; `face` `[D]` raw, zeros for a picture without a human or a dropped face; `keeps_style`;
        `original_size`.
        """
        config, record = self.config, source.record(index)
        draws = {name: generator(config.seed, epoch, record.key, name) for name in ("drop", "noise")}
        variant = picture_variant(config.data, epoch)
        draws["image"] = generator(config.seed, variant, record.key, "image")
        drop_style, drop_face = guidance_drops(config, draws["drop"])
        return {
            "key": record.key,
            "epoch": epoch,
            "picture_id": (record.key, variant),
            "original_size": record.original_size,
            "keeps_style": not drop_style,
            "face": self._face(record.embedding, record.key, drop_face),
            **self._pictures(source, index, draws["image"]),
            **noises(config.latent_size, draws["noise"], timesteps=config.schedule.timesteps),
        }

    def _face(self, embedding: np.ndarray | None, key: str, drop: bool) -> Tensor:
        if embedding is None or drop:
            return torch.zeros(self.face_width)
        if embedding.shape != (self.face_width,):
            raise ValueError(
                f"sample {key}: its face embedding has {embedding.size} numbers, the others have {self.face_width}; "
                "prepare the whole data set with one face pack"
            )
        return torch.from_numpy(np.array(embedding, dtype=np.float32))

    def _pictures(self, source: Source, index: int, gen: torch.Generator) -> dict[str, Any]:
        data, found = self.config.data, dict[str, Any]()
        mirror = uniform(gen) < data.augment.flip and data.latents == "encode" and not self.config.guidance.cached
        if data.latents == "cached":
            found["moments"] = cached_moments(source, index, "target", data.resolution)
        else:
            found["pixels"] = to_rgb_pm1(_mirrored(square(source.picture(index), data.resolution), mirror))
        if not self.config.guidance.reads_style:
            return found
        if self.config.guidance.cached:
            return found | {"style": source.style(index).float()}
        return found | {"style_pixels": _style(source, index, data.resolution, mirror)}


def _mirrored(picture: np.ndarray, mirror: bool) -> np.ndarray:
    return picture[:, ::-1] if mirror else picture


def _style(source: Source, index: int, size: int, mirror: bool) -> Tensor:
    """The target with its face hidden, exactly as the node hides it."""
    picture, mask = source.picture(index), source.face_mask(index)
    image = to_rgb01(_mirrored(square(picture, size), mirror))
    region = to_rgb01(_mirrored(square(np.repeat(mask[..., None], 3, axis=2), size), mirror))[..., 0]
    return hide_region(image[None], region[None])[0]


def guidance_drops(config: TrainConfig, gen: torch.Generator) -> tuple[bool, bool]:
    """(style, face): two independent drops (METHOD 2.5)."""
    style, face = uniform(gen), uniform(gen)
    return style < config.guidance.style_drop, face < config.guidance.face_drop
