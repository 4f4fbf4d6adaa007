"""Which face of several: an order and a number in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .embedding import cosine_matrix
from .encoder import Face

LARGEST, LEFT_RIGHT, RIGHT_LEFT, TOP_BOTTOM, MOST_SIMILAR = (
    "largest",
    "left to right",
    "right to left",
    "top to bottom",
    "most similar",
)
ORDERS = (LARGEST, LEFT_RIGHT, RIGHT_LEFT, TOP_BOTTOM, MOST_SIMILAR)


def order_faces(faces: Sequence[Face], order: str, similarities: Sequence[float] | None = None) -> list[int]:
    """Indices of faces in an order of :data:`ORDERS`; ``most similar`` needs one cosine per face, highest first."""
    if order not in ORDERS:
        raise ValueError(f"unknown order of faces {order!r}; choose one of {', '.join(ORDERS)}")
    if order == MOST_SIMILAR:
        if similarities is None:
            raise ValueError(f"the order {MOST_SIMILAR!r} needs an identity to compare with; connect one")
        return sorted(range(len(faces)), key=lambda i: -similarities[i])
    keys = {
        LARGEST: lambda face: -face.area,
        LEFT_RIGHT: lambda face: face.center[0],
        RIGHT_LEFT: lambda face: -face.center[0],
        TOP_BOTTOM: lambda face: face.center[1],
    }
    return sorted(range(len(faces)), key=lambda i: keys[order](faces[i]))


def pick_face(ordered: Sequence[int], number: int) -> int:
    """The ``number``-th (from 1) of an order; ``ValueError`` when there are fewer faces."""
    if not 1 <= number <= len(ordered):
        found = "1 face was found" if len(ordered) == 1 else f"{len(ordered)} faces were found"
        raise ValueError(f"face number {number} was asked for, but {found}; choose a number from 1 to {len(ordered)}")
    return ordered[number - 1]


def similarities_to(wanted: np.ndarray, embeddings: np.ndarray) -> list[float]:
    """Cosine of one embedding ``[D]`` with each of ``[N, D]``."""
    return [float(value) for value in cosine_matrix(wanted[None], embeddings)[0]]
