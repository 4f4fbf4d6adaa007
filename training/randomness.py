"""Everything random about a sample comes from (seed, epoch, sample key): exact resume follows from it.

No global generator is read, so the number of processes, loader workers and restarts cannot matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def generator(*parts: object) -> torch.Generator:
    """A CPU generator that depends on nothing but `parts` (seed, epoch, key, purpose)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def uniform(gen: torch.Generator) -> float:
    """A number in [0, 1)."""
    return float(torch.rand((), generator=gen, dtype=torch.float64))


def whole(gen: torch.Generator, stop: int) -> int:
    """A whole number in [0, stop)."""
    return int(torch.randint(stop, (), generator=gen))


@lru_cache(maxsize=2)
def epoch_order(num: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits `num` samples: `[num]` int64."""
    return torch.randperm(num, generator=generator(seed, epoch, "order"))


@dataclass(frozen=True)
class Place:
    """Where a position of the endless sample stream lies."""

    epoch: int
    index: int


def place(position: int, num: int, seed: int) -> Place:
    """Position in the stream of all epochs one after the other -> epoch and sample index."""
    epoch, offset = divmod(position, num)
    return Place(epoch, int(epoch_order(num, seed, epoch)[offset]))


def batches(
    *, start_step: int, stop_step: int, batch: int, accumulation: int, rank: int, world: int
) -> Iterator[list[int]]:
    """Stream positions of every forward pass of one process.

    A step takes `batch * world * accumulation` consecutive positions; every pass takes `batch * world` of them and
    every process its `batch`. So the same samples make up a step however they are spread over processes and passes.
    """
    per_pass = batch * world
    for number in range(start_step * accumulation, stop_step * accumulation):
        first = number * per_pass + rank * batch
        yield list(range(first, first + batch))
