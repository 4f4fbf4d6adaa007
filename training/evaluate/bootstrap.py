"""How sure a mean is: the percentile bootstrap over people (Efron 1979)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` people and its 95 % interval; without bounds when one person says nothing about spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def overlaps(self, other: Estimate) -> bool | None:
        """Whether the two intervals share a value; None when one has no bounds."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON."""
        return asdict(self)


def estimate(values: Sequence[float], *, resamples: int, seed: int) -> Estimate | None:
    """Mean of one value per person, and the 2.5 % and 97.5 % quantiles of that mean over resampled people.

    None without values. The same seed gives the same bounds.
    """
    known = np.asarray(values, dtype=np.float64)
    if not len(known):
        return None
    mean = float(known.mean())
    if len(known) == 1:
        return Estimate(mean, None, None, 1)
    rng = np.random.default_rng(seed)
    means = known[rng.integers(0, len(known), (resamples, len(known)))].mean(axis=1)
    outside = (1 - COVERAGE) / 2
    low, high = np.quantile(means, [outside, 1 - outside])
    return Estimate(mean, float(low), float(high), len(known))


def paired_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, resamples: int, seed: int
) -> Estimate | None:
    """The mean of ours - theirs over the people that both have, with the interval of that mean.

    Pairing removes what people differ in among themselves, so that this is sharper than comparing two intervals.
    """
    both = sorted(set(ours) & set(theirs))
    return estimate([ours[unit] - theirs[unit] for unit in both], resamples=resamples, seed=seed)
