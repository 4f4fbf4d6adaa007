"""Fusion samples: a target, a face reference, and everything random about them, drawn from (seed, epoch, key).

A map-style data set over positions of the endless stream (see `randomness`). Nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attention.grid import LATENT_SCALE

from .augment import augmented_reference, flipped, pick, square, to_rgb_pm1
from .config import DataConfig, DropConfig, TrainConfig
from .randomness import generator, place, uniform, whole
from .source import Source
from .thumbnails import SIDES

TIMESTEPS = 1000
LATENT_CHANNELS = 4

Sample = dict[str, Any]
"""`key`, `epoch`, and tensors; the keys are listed where a sample is made."""
Draw = Callable[[Source, int, int], Sample]
"""(source, index, epoch) -> sample."""


class StreamDataset(Dataset):
    """Position in the stream of all epochs -> sample. Equal positions give equal samples, always."""

    def __init__(self, source: Source, draw: Draw, seed: int) -> None:
        self.source = source
        self.draw = draw
        self.seed = seed

    def __getitem__(self, position: int) -> Sample:
        where = place(position, len(self.source), self.seed)
        return self.draw(self.source, where.index, where.epoch)


class FusionDraw:
    """Makes the samples of METHOD 1.5."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.augment = config.data.augment

    def __call__(self, source: Source, index: int, epoch: int) -> Sample:
        """A sample with

        pixels `[3, H, W]` in [-1, 1] or moments `[8, h, w]`, the same for the reference as `reference_*`; `vae_noise`,
        `noise`, `reference_noise` `[4, h, w]`; `timestep`; `caption` (empty when dropped); `has_face`; `original_size`;
        `picture_id` and `reference_id`, equal exactly where the pictures are.
        """
        config, record = self.config, source.record(index)
        draws = {name: generator(config.seed, epoch, record.key, name) for name in ("drop", "pair", "noise")}
        variant = picture_variant(config.data, epoch)
        draws["image"] = generator(config.seed, variant, record.key, "image")
        drop_face, drop_text = dropped(config.drops, uniform(draws["drop"]))
        other = reference_index(source, index, config.data.pair_mode, draws["pair"])
        return {
            "key": record.key,
            "epoch": epoch,
            "caption": "" if drop_text else record.caption,
            "has_face": record.has_face and not drop_face,
            "picture_id": (record.key, variant),
            "reference_id": (source.record(other).key, record.key, variant),
            "original_size": record.original_size,
            **target_picture(source, index, config.data, draws["image"]),
            **self._reference(source, other if record.has_face else None, draws["image"]),
            **noises(config.latent_size, draws["noise"], timesteps=config.schedule.timesteps),
            "reference_noise": latent_noise(config.reference.size // LATENT_SCALE, draws["noise"]),
        }

    def _reference(self, source: Source, index: int | None, gen: torch.Generator) -> Sample:
        """The reference's picture or moments; zeros, which nobody looks at, for a target without a face (None)."""
        size = self.config.reference.size
        if self.config.data.latents == "cached":
            return {"reference_moments": cached_moments(source, index, "reference", size)}
        if index is None:
            return {"reference_pixels": torch.zeros(3, size, size)}
        return {
            "reference_pixels": to_rgb_pm1(augmented_reference(square(source.face(index), size), self.augment, gen))
        }


class PictureDraw:
    """Samples without a face: the target alone, for training an autoencoder or a base model."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def __call__(self, source: Source, index: int, epoch: int) -> Sample:
        """`pixels` or `moments`, `picture_id`, `vae_noise`, `noise`, `timestep`, `caption`, `original_size`.

        `thumbnail_side` is in pixels, 0 for none.
        """
        config, record = self.config, source.record(index)
        variant = picture_variant(config.data, epoch)
        draws = generator(config.seed, epoch, record.key, "noise")
        return {
            "key": record.key,
            "epoch": epoch,
            "picture_id": (record.key, variant),
            "caption": record.caption,
            "thumbnail_side": thumbnail_side(
                config.denoiser.drop, generator(config.seed, epoch, record.key, "condition")
            ),
            "original_size": record.original_size,
            **target_picture(source, index, config.data, generator(config.seed, variant, record.key, "image")),
            **noises(config.latent_size, draws, timesteps=config.schedule.timesteps),
        }


def thumbnail_side(drop: float, gen: torch.Generator) -> int:
    """0, no thumbnail, with probability `drop`; else one of `SIDES`, each equally likely."""
    return 0 if uniform(gen) < drop else pick(list(SIDES), gen)


def picture_variant(data: DataConfig, epoch: int) -> int:
    """Which of a picture's augmentations an epoch shows: always a new one, or one of `data.variants`."""
    return epoch if data.variants is None or epoch < 0 else epoch % data.variants


def dropped(drops: DropConfig, u: float) -> tuple[bool, bool]:
    """(face, text) for a number u in [0, 1): three exclusive cases, face only, text only, both (METHOD 1.5)."""
    if u < drops.face:
        return True, False
    if u < drops.face + drops.text:
        return False, True
    both = u < drops.face + drops.text + drops.both
    return both, both


def reference_index(source: Source, index: int, mode: str, gen: torch.Generator) -> int:
    """Whose face crop goes with this target: another photo of the person prevents copy-paste."""
    coin, others = uniform(gen), list(source.same_person(index))
    if mode == "same" or not others or (mode == "mixed" and coin < 0.5):
        return index
    return pick(others, gen)


def target_picture(source: Source, index: int, data: DataConfig, gen: torch.Generator) -> Sample:
    """`pixels`, or `moments` when they are cached."""
    if data.latents == "cached":
        return {"moments": cached_moments(source, index, "target", data.resolution)}
    picture = flipped(square(source.picture(index), data.resolution), data.augment.flip, gen)
    return {"pixels": to_rgb_pm1(picture)}


def cached_moments(source: Source, index: int | None, which: str, size: int) -> Tensor:
    """Moments `[8, h, w]` fp32 of a picture of `size` pixels; zeros for None.

    Raises ValueError when the cache has another size.
    """
    side = size // LATENT_SCALE
    if index is None:
        return torch.zeros(2 * LATENT_CHANNELS, side, side)
    moments = source.moments(index, which).float()
    if moments.shape[1:] != (side, side):
        height, width = (LATENT_SCALE * s for s in moments.shape[1:])
        raise ValueError(
            f"sample {source.record(index).key}: the cached {which} is {width}x{height} pixels, this run wants "
            f"{size}x{size}. Set data.resolution and reference.size to what prepare packed (square), or "
            "data.latents=encode"
        )
    return moments


def noises(latent_size: int, gen: torch.Generator, *, timesteps: str = "uniform") -> Sample:
    """`timestep`, `noise` and `vae_noise` of one sample."""
    drawn = whole(gen, TIMESTEPS)
    if timesteps == "noisy":
        drawn = max(drawn, whole(gen, TIMESTEPS))
    return {
        "timestep": torch.tensor(drawn),
        "noise": latent_noise(latent_size, gen),
        "vae_noise": latent_noise(latent_size, gen),
    }


def latent_noise(size: int, gen: torch.Generator) -> Tensor:
    """Gaussian noise `[4, size, size]`."""
    return torch.randn(LATENT_CHANNELS, size, size, generator=gen)


def collate(samples: Sequence[Sample]) -> Sample:
    """Stacks tensors, keeps everything else as a list."""
    first = samples[0]
    return {
        name: torch.stack([s[name] for s in samples]) if isinstance(value, Tensor) else [s[name] for s in samples]
        for name, value in first.items()
    }


def loader(dataset: Dataset, positions: Iterable[list[int]], *, workers: int) -> DataLoader:
    """Batches at the given positions, in that order."""
    return DataLoader(
        dataset,
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
    )
