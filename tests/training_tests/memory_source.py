"""A data set in memory: drawn faces, so that a training test needs no files and no detector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.randomness import generator
from training.source import Record


def drawn_face(number: int, size: int) -> np.ndarray:
    """A disc with two eyes on a background; colours and place depend on the number. uint8 `[size, size, 3]`."""
    gen = generator("face", number)
    back, skin, eyes = (torch.randint(30, 226, (3,), generator=gen).numpy() for _ in range(3))
    cy, cx = (0.35 + 0.3 * float(torch.rand((), generator=gen)) for _ in range(2))
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = back
    picture[(y - cy) ** 2 + (x - cx) ** 2 < 0.08] = skin
    for side in (-0.1, 0.1):
        picture[(y - cy + 0.06) ** 2 + (x - cx - side) ** 2 < 0.003] = eyes
    return picture


class MemorySource:
    """`num` samples; every two neighbours are the same person. Style and face embeddings are Gaussian."""

    encoder = "drawn"
    encoder_name = "drawn faces"

    def __init__(
        self, num: int, size: int = 64, *, prefix: str = "p", non_human: tuple[int, ...] = (), face_width: int = 8
    ) -> None:
        self.num, self.size, self.prefix = num, size, prefix
        self.non_human, self.face_width = non_human, face_width
        self.fingerprint = f"memory-{prefix}-{num}-{size}"

    def __len__(self) -> int:
        return self.num

    def record(self, index: int) -> Record:
        human = index not in self.non_human
        embedding = torch.randn(self.face_width, generator=generator("embedding", index)).numpy() if human else None
        return Record(f"{self.prefix}{index}", f"a man {'abcdefgh'[index % 8]}", human, (2 * self.size,) * 2, embedding)

    def same_person(self, index: int) -> list[int]:
        return [index ^ 1] if (index ^ 1) < self.num else []

    def picture(self, index: int) -> np.ndarray:
        return drawn_face(index, self.size)

    def face(self, index: int) -> np.ndarray:
        return drawn_face(index, self.size)

    def face_mask(self, index: int) -> np.ndarray:
        y, x = (np.mgrid[0 : self.size, 0 : self.size] + 0.5) / self.size
        return (((y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.08) * 255).astype(np.uint8)

    def moments(self, index: int, which: str) -> Tensor:
        return torch.randn(8, self.size // 8, self.size // 8, generator=generator(which, index))

    def style(self, index: int) -> Tensor:
        return torch.randn(12, generator=generator("style", index))
