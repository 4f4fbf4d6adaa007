"""Automatic masks: the people of a picture are found and each identity gets one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..faces.align import align_face
from ..faces.assign import assign_by_order, assign_by_similarity, require_enough_faces
from ..faces.cache import embed_cached, find_faces_cached
from ..faces.encoder import Face
from ..faces.identity import Identity as Person
from ..faces.identity import mixed_embedding
from ..faces.mix import require_encoder
from ..faces.people import body_labels, head_labels, person_map
from ..faces.select import LARGEST, LEFT_RIGHT, MOST_SIMILAR, RIGHT_LEFT, TOP_BOTTOM
from .segmentation_files import load_segmenter
from .wire_types import Place

ORDER_OF_CHOICE = {
    "left to right": LEFT_RIGHT,
    "right to left": RIGHT_LEFT,
    "top to bottom": TOP_BOTTOM,
    "largest first": LARGEST,
    "most similar": MOST_SIMILAR,
}
LARGEST_MAP = 1536
"""Longer side in pixels of the masks that are found: far more than the layers of a UNet see."""
HEAD, BODY = "head", "body"
REGIONS = [HEAD, BODY]


@dataclass(frozen=True, eq=False)
class FoundPeople:
    """Every person's place, and the faces of the picture that nobody got: they are background."""

    places: tuple[Place, ...]
    bystanders: tuple[Face, ...] = ()


def find_people(
    picture: np.ndarray, people: Sequence[Person], places: Sequence[Place], encoder: Any, *, assign: str, region: str
) -> FoundPeople:
    """Places in a picture (uint8 `[H, W, 3]`) for everybody whose place was not painted; painted ones stay.

    Faces under a painted mask are taken. Raises ValueError for too few faces, no encoder, an identity that cannot be
    compared, or a missing segmentation model.
    """
    wanted = [index for index, place in enumerate(places) if not place.painted]
    if not wanted:
        return FoundPeople(tuple(places))
    if encoder is None:
        raise ValueError("'content' needs 'encoder' to find its faces; connect LoadIdentityEncoder")
    faces = find_faces_cached(picture, encoder).faces
    painted = [place.mask for place in places if place.painted and place.mask is not None]
    free = [number for number, face in enumerate(faces) if not _taken(face, picture, painted)]
    chosen = _chosen([faces[number] for number in free], [people[index] for index in wanted], picture, encoder, assign)
    labels = _labels(picture, faces, region)
    found = list(places)
    for index, choice in zip(wanted, chosen, strict=True):
        found[index] = Place(torch.from_numpy((labels == free[choice]).astype(np.float32)))
    left_over = set(free) - {free[choice] for choice in chosen}
    return FoundPeople(tuple(found), tuple(faces[number] for number in sorted(left_over)))


def _chosen(
    faces: Sequence[Face], people: Sequence[Person], picture: np.ndarray, encoder: Any, assign: str
) -> list[int]:
    """Face index of each person."""
    order = ORDER_OF_CHOICE[assign]
    if order != MOST_SIMILAR:
        return assign_by_order(faces, len(people), order)
    require_enough_faces(len(faces), len(people))
    for person in people:
        require_encoder(person, encoder.fingerprint)
    aligned = [align_face(picture, face.keypoints) for face in faces]
    chosen, _ = assign_by_similarity(
        np.stack(embed_cached(aligned, encoder)), np.stack([mixed_embedding(person) for person in people])
    )
    return chosen


def _labels(picture: np.ndarray, faces: Sequence[Face], region: str) -> np.ndarray:
    """Label map of all faces, so that nobody's region reaches into a bystander; at most LARGEST_MAP pixels long."""
    height, width = picture.shape[:2]
    scale = min(1.0, LARGEST_MAP / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = [_scaled(face, scale) for face in faces]
    if region == HEAD:
        return head_labels(small, *size)
    seen = picture if scale == 1.0 else np.asarray(Image.fromarray(picture).resize(size[::-1]))
    return body_labels(small, person_map(seen, small, load_segmenter()))


def _scaled(face: Face, scale: float) -> Face:
    x0, y0, x1, y1 = (side * scale for side in face.box)
    return Face((x0, y0, x1, y1), face.score, face.keypoints * np.float32(scale))


def _taken(face: Face, picture: np.ndarray, painted: Sequence[Tensor]) -> bool:
    """Whether a face's centre lies under a mask (of any size) that was painted for somebody."""
    x, y = face.center
    height, width = picture.shape[:2]
    for mask in painted:
        rows, columns = mask.shape
        row, column = int(y / height * rows), int(x / width * columns)
        if mask[min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)] >= 0.5:
            return True
    return False
