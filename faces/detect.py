"""Finding faces with retries: smaller detector sizes, then a padded picture, then a larger size.

Detectors miss faces that fill the picture (they want surroundings) and faces that get too small when a large photo is
scaled down. Each retry is one more look; the first look that is sure of a face ends the search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .boxes import overlap_matrix
from .encoder import Face, FaceEncoder

SIZE_STEPS = (1.0, 0.75, 0.5, 0.375)
PADDING_STEPS = ((1 / 3, 1.0), (1 / 3, 0.5), (1.0, 1.0))
"""(padding on each side as a part of the longer side, part of the detector size)."""
SMALLEST_LOOK, LARGEST_LOOK = 128, 1920
SIZE_MULTIPLE = 32
SURE_ABOVE_FLOOR = 0.1
"""A best score less than this above the detector's floor is believed only when a second look sees the same face."""
SAME_FACE_OVERLAP = 0.4
SAME_FACE_DISTANCE = 0.3
SMALLEST_FACE = 8.0


@dataclass(frozen=True)
class Look:
    """One pass of the detector."""

    size: int
    padding: float = 0.0

    def __str__(self) -> str:
        return f"{self.size} px" + (f" padded by {self.padding:.0%}" if self.padding else "")


@dataclass(frozen=True, eq=False)
class Detections:
    """The faces of one picture, best score first, and the look that found them (None when no face was found)."""

    faces: tuple[Face, ...]
    found_by: Look | None
    looks: int
    """Passes it took."""


def looks_to_try(det_size: int, height: int, width: int) -> Iterator[Look]:
    """The looks in order: the given size first, always."""
    sizes = [_round(det_size * step) for step in SIZE_STEPS]
    yield from dict.fromkeys(Look(size) for size in sizes)
    yield from dict.fromkeys(Look(_round(det_size * step), padding) for padding, step in PADDING_STEPS)
    larger = min(_round(det_size * 2), LARGEST_LOOK)
    if max(height, width) > det_size and larger > det_size:
        yield Look(larger)


def find_faces(
    image: np.ndarray, encoder: FaceEncoder, *, det_size: int | None = None, retry: bool = True
) -> Detections:
    """All faces of uint8 ``[H, W, 3]`` RGB, each once, best score first.

    ``retry=False`` is one plain pass at the given size (default: the encoder's). A look whose best score is barely
    above the detector's floor counts only when another look sees the same face, so noise is never reported as a face.
    """
    height, width = image.shape[:2]
    doubtful: list[tuple[Look, tuple[Face, ...]]] = []
    looks = 0
    for look in looks_to_try(det_size or encoder.det_size, height, width):
        faces = _look(image, encoder, look)
        looks += 1
        sure = bool(faces) and faces[0].score >= encoder.score_floor + SURE_ABOVE_FLOOR
        if sure or not retry:
            return Detections(faces, look if faces else None, looks)
        confirmed = _confirmed(faces, doubtful)
        if confirmed:
            return Detections(confirmed, look, looks)
        if faces:
            doubtful.append((look, faces))
    return Detections((), None, looks)


def distinct_faces(faces: list[Face]) -> tuple[Face, ...]:
    """Each face once: of two detections whose boxes overlap or whose key points coincide the better score stays."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if not any(_same_face(face, other) for other in kept):
            kept.append(face)
    return tuple(kept)


def _look(image: np.ndarray, encoder: FaceEncoder, look: Look) -> tuple[Face, ...]:
    if not look.padding:
        return _usable(encoder.detect(image, look.size, encoder.score_floor), image)
    seen, scale, pad = _padded(image, look)
    faces = encoder.detect(seen, look.size, encoder.score_floor)
    return _usable([_moved_back(face, scale, pad) for face in faces], image)


def _padded(image: np.ndarray, look: Look) -> tuple[np.ndarray, float, int]:
    """The picture with its edge pixels repeated around it, the factor it was shrunk by before, and the border's width.

    It is shrunk first to what the detector will look at anyway: a padded large photo would take gigabytes.
    """
    longer = max(image.shape[:2])
    scale = min(1.0, look.size / longer)
    if scale < 1:
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    pad = round(max(image.shape[:2]) * look.padding)
    return np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge"), scale, pad


def _moved_back(face: Face, scale: float, pad: int) -> Face:
    x0, y0, x1, y1 = ((value - pad) / scale for value in face.box)
    return Face((x0, y0, x1, y1), face.score, ((face.keypoints - pad) / scale).astype(np.float32))


def _usable(faces: list[Face], image: np.ndarray) -> tuple[Face, ...]:
    return distinct_faces([face for face in faces if _inside(face, image)])


def _inside(face: Face, image: np.ndarray) -> bool:
    height, width = image.shape[:2]
    x, y = face.center
    return 0 <= x < width and 0 <= y < height and min(face.width, face.height) >= SMALLEST_FACE


def _confirmed(faces: tuple[Face, ...], earlier: list[tuple[Look, tuple[Face, ...]]]) -> tuple[Face, ...]:
    seen_before = [face for _, others in earlier for face in others]
    return tuple(face for face in faces if any(_same_face(face, other) for other in seen_before))


def _same_face(a: Face, b: Face) -> bool:
    overlap = overlap_matrix(np.array([a.box]), np.array([b.box]))[0, 0]
    distance = float(np.linalg.norm(a.keypoints.mean(axis=0) - b.keypoints.mean(axis=0)))
    return overlap > SAME_FACE_OVERLAP or distance < SAME_FACE_DISTANCE * min(a.width, b.width)


def _round(size: float) -> int:
    return max(SMALLEST_LOOK, round(size / SIZE_MULTIPLE) * SIZE_MULTIPLE)
