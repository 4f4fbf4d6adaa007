"""What the trainer needs from a data set: pictures by number, and what prepare found out about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Record:
    """One sample without its pictures.

    embedding: the recogniser's raw output `[D]`, None for pictures without a face. original_size: (height, width) in
    pixels before prepare cropped.
    """

    key: str
    caption: str
    has_face: bool
    original_size: tuple[int, int]
    embedding: np.ndarray | None = None


class Source(Protocol):
    """A prepared data set, or one split of it. Samples are numbered 0 .. len-1 in the order of the index."""

    @property
    def fingerprint(self) -> str:
        """Changes when any sample changes; a run is only resumed on the data it began with."""

    @property
    def encoder(self) -> str:
        """sha256 of the recogniser whose embeddings these are, empty when none was used."""

    @property
    def encoder_name(self) -> str:
        """What the user calls that recogniser, for messages; empty when none was used."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """Everything but the pictures."""

    def same_person(self, index: int) -> Sequence[int]:
        """Other samples of the same person."""

    def picture(self, index: int) -> np.ndarray:
        """The target, uint8 `[H, W, 3]`. Raises ValueError naming the sample when it cannot be read."""

    def face(self, index: int) -> np.ndarray:
        """The face crop, uint8 `[S, S, 3]`."""

    def face_mask(self, index: int) -> np.ndarray:
        """Where the face is in the target, uint8 `[H, W]`, 255 = face."""

    def moments(self, index: int, which: str) -> Tensor:
        """Cached VAE moments `[8, h, w]` of the `target` or the `reference`, unscaled."""

    def style(self, index: int) -> Tensor:
        """Cached CLIP image embedding `[S]` of the target with its face masked."""
