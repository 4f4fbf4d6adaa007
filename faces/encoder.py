"""What every face backend offers. ``faces/`` uses backends only through this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .identity import EncoderFingerprint


@dataclass(frozen=True, eq=False)
class Face:
    """One found face, in pixels of the picture it was found in."""

    box: tuple[float, float, float, float]
    """(x0, y0, x1, y1); may reach over the border."""
    score: float
    """In [0, 1]."""
    keypoints: np.ndarray
    """float32 ``[5, 2]``: left eye, right eye, nose, left and right corner of the mouth; left in the picture."""

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def area(self) -> float:
        return max(0.0, self.width) * max(0.0, self.height)

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class FaceEncoder(Protocol):
    """A detector and, usually, a recogniser."""

    @property
    def fingerprint(self) -> EncoderFingerprint: ...

    @property
    def provider(self) -> str:
        """The onnxruntime provider really in use (``OpenCV`` for the OpenCV backend)."""

    @property
    def det_size(self) -> int:
        """Side in pixels of the square the detector first looks at."""

    @property
    def score_floor(self) -> float:
        """The detector's score below which it also sees faces in noise."""

    def detect(self, image: np.ndarray, size: int, threshold: float) -> list[Face]:
        """One plain pass over uint8 ``[H, W, 3]`` RGB, scaled into ``size`` x ``size``; best score first."""

    def embed(self, aligned: np.ndarray) -> np.ndarray:
        """Raw embeddings float32 ``[N, D]`` of uint8 ``[N, 112, 112, 3]`` RGB aligned faces."""
