"""Which found face is which identity: by place, by size, or by likeness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .embedding import cosine_matrix
from .encoder import Face
from .select import LARGEST, MOST_SIMILAR, order_faces


def assign_by_order(faces: Sequence[Face], identities: int, order: str) -> list[int]:
    """Face index of each identity, in the identities' order.

    With more faces than identities the largest faces are taken first and then put in order, so that passers-by in the
    background do not shift everybody. Fewer faces than identities: ``ValueError``.
    """
    require_enough_faces(len(faces), identities)
    if order == MOST_SIMILAR:
        raise ValueError(f"{MOST_SIMILAR!r} is not an order of places; it needs the embeddings of faces and identities")
    main = order_faces(faces, LARGEST)[:identities]
    inner = order_faces([faces[index] for index in main], order)
    return [main[place] for place in inner]


def assign_by_similarity(face_embeddings: np.ndarray, identity_embeddings: np.ndarray) -> tuple[list[int], list[float]]:
    """Face index and cosine of each identity such that the sum of cosines is largest (Hungarian method).

    Takes ``[faces, D]`` and ``[identities, D]``. Fewer faces than identities: ``ValueError``.
    """
    from scipy.optimize import linear_sum_assignment

    require_enough_faces(len(face_embeddings), len(identity_embeddings))
    similarity = cosine_matrix(identity_embeddings, face_embeddings)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return [int(column) for column in columns], [float(value) for value in similarity[rows, columns]]


def require_enough_faces(faces: int, identities: int) -> None:
    """``ValueError`` when a picture has fewer faces than there are identities to place in it."""
    if faces < identities:
        raise ValueError(
            f"{faces} face{'' if faces == 1 else 's'} found in the picture for {identities} "
            f"identit{'y' if identities == 1 else 'ies'}; use a picture with as many visible faces as identities "
            "(small ones are found with a larger det_size), connect fewer identities, or draw the masks by hand"
        )
