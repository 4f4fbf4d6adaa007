"""Seconds per picture as a + b N for N references: a line by least squares, with the interval of its slope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """seconds = a + b N, with 95 % intervals (Student's t); without bounds when two points leave nothing over."""

    a: float
    b: float
    a_bounds: tuple[float, float] | None
    b_bounds: tuple[float, float] | None
    count: int


def fit_line(seconds: Mapping[int, Sequence[float]]) -> Line:
    """The line through every measured picture: number of references -> seconds of each repeat.

    Raises ValueError when fewer than two different numbers were measured.
    """
    x = np.array([n for n, values in seconds.items() for _ in values], dtype=np.float64)
    y = np.array([value for values in seconds.values() for value in values], dtype=np.float64)
    if len(set(x)) < 2:
        raise ValueError(f"a line needs two different numbers of references, got {sorted(set(x))}")
    columns = np.stack([np.ones_like(x), x], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, y, rcond=None)
    free = len(x) - 2
    if free < 1:
        return Line(float(a), float(b), None, None, len(x))
    from scipy.stats import t as student

    variance = float(np.sum((y - columns @ [a, b]) ** 2)) / free
    errors = np.sqrt(variance * np.diag(np.linalg.inv(columns.T @ columns))) * student.ppf(0.975, free)
    bounds = [(float(value - error), float(value + error)) for value, error in zip((a, b), errors)]
    return Line(float(a), float(b), bounds[0], bounds[1], len(x))
