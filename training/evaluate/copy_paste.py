"""The copy-paste score of MultiID-Bench (WithAnyone, 2025): nearer to the reference than to the person?"""

from __future__ import annotations

import numpy as np

from faces.embedding import cosine

SMALLEST_ANGLE = 1e-3


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle between two embeddings `[D]`, radians in [0, pi]."""
    return float(np.arccos(np.clip(cosine(a, b), -1.0, 1.0)))


def copy_paste(drawn: np.ndarray, held_out: np.ndarray, reference: np.ndarray) -> float | None:
    """CP = (angle(drawn, held out) - angle(drawn, reference)) / angle(held out, reference), embeddings `[D]`.

    1: the reference was copied. 0: as far from the one photo as from the other. -1: the unseen photo itself. None when
    the two photos are the same one.
    """
    between = angle(held_out, reference)
    if between < SMALLEST_ANGLE:
        return None
    return (angle(drawn, held_out) - angle(drawn, reference)) / between
