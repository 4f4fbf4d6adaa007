"""Progress on stderr: pictures per second and the time left, without tearing log lines apart."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

TERMINAL_SECONDS, FILE_SECONDS = 0.2, 15.0


@dataclass
class StageTiming:
    """What the report says about one stage of this run."""

    stage: str
    shards: int
    reused: int
    items: int = 0
    busy: float = 0.0
    """Seconds summed over workers."""
    wall: float = 0.0

    @property
    def per_second(self) -> float:
        return self.items / self.wall if self.wall > 0 else 0.0

    @property
    def per_second_and_core(self) -> float:
        return self.items / self.busy if self.busy > 0 else 0.0


@dataclass
class Progress:
    """The bars of one run and its timings."""

    quiet: bool = False
    timings: list[StageTiming] = field(default_factory=list)

    @contextmanager
    def stage(self, timing: StageTiming, total: int) -> Iterator[tqdm]:
        """A bar that counts pictures; records the stage's wall time."""
        self.timings.append(timing)
        start = time.perf_counter()
        terminal = sys.stderr.isatty()
        with (
            logging_redirect_tqdm(),
            tqdm(
                total=total,
                desc=f"{timing.stage:>8}",
                unit="img",
                disable=self.quiet,
                file=sys.stderr,
                # In a log file every refresh is a new line.
                mininterval=TERMINAL_SECONDS if terminal else FILE_SECONDS,
                dynamic_ncols=terminal,
            ) as bar,
        ):
            try:
                yield bar
            finally:
                timing.wall = time.perf_counter() - start
