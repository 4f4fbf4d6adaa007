"""Is a found face good enough to stand for a person: its size, its sharpness, the detector's score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .encoder import Face

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Quality:
    size: float
    """Shorter side of the face box in pixels of the picture."""
    sharpness: float
    """Variance of the Laplacian of the aligned 112 px face, grey levels squared; blurred faces are below about 50."""
    score: float
    """The detector's, in [0, 1]."""

    def __str__(self) -> str:
        return f"{self.size:.0f} px, sharpness {self.sharpness:.0f}, score {self.score:.2f}"


@dataclass(frozen=True)
class QualityGate:
    """Lower bounds; 0 lets everything pass."""

    min_size: float = 0.0
    min_sharpness: float = 0.0
    min_score: float = 0.0


def measure_quality(face: Face, aligned: np.ndarray) -> Quality:
    """Quality of a face and its aligned picture uint8 ``[112, 112, 3]``."""
    return Quality(min(face.width, face.height), sharpness(aligned), face.score)


def sharpness(picture: np.ndarray) -> float:
    """Variance of the four-neighbour Laplacian of uint8 ``[H, W, 3]`` RGB as grey, in grey levels squared."""
    grey = picture.astype(np.float32) @ LUMA
    neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float(np.var(neighbours - 4 * grey[1:-1, 1:-1]))


def gate_problem(quality: Quality, gate: QualityGate) -> str | None:
    """Why a face does not pass the gate, or None when it does."""
    checks = (
        (quality.size, gate.min_size, "the face is {got:.0f} px small, wanted are {want:.0f} px"),
        (quality.sharpness, gate.min_sharpness, "the face's sharpness is {got:.0f}, wanted is {want:.0f}"),
        (quality.score, gate.min_score, "the detector's score is {got:.2f}, wanted is {want:.2f}"),
    )
    problems = [text.format(got=got, want=want) for got, want, text in checks if got < want]
    return "; ".join(problems) or None
