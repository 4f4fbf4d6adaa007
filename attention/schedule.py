"""When the identity acts: a window of noise levels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Noise levels (sigma) between which the identity acts: `sigma_end <= sigma <= sigma_start`.

    Sampling runs from large sigma to small, so `sigma_start` is the larger one. Units: the model's own sigmas.
    """

    sigma_start: float = float("inf")
    sigma_end: float = 0.0

    @property
    def always(self) -> bool:
        """Whether no noise level is outside."""
        return self.sigma_start == float("inf") and self.sigma_end <= 0.0

    def contains(self, sigma: float) -> bool:
        """Whether a step at this noise level is inside the window, both ends included."""
        return self.sigma_end <= sigma <= self.sigma_start


def check_percents(start: float, end: float) -> None:
    """Raises ValueError unless 0 <= start <= end <= 1."""
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(
            f"start_percent is {start:g} and end_percent {end:g}; both lie between 0 and 1 (fractions of the sampling "
            "run), and the first must not be the larger one. Lower start_percent or raise end_percent"
        )
