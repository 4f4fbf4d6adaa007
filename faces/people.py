"""Where each person is in a picture: heads grown from face boxes, and bodies when a person segmentation model is there.

A picture is split by a label map: int16 ``[H, W]``, -1 for the background, else the index of the face it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .encoder import Face
from .onnx_header import read_header
from .sessions import OnnxModel, load_model

BACKGROUND = -1
HEAD_WIDTH, HEAD_HEIGHT, HEAD_LIFT = 0.8, 0.85, 0.12
"""Half axes of the head's ellipse in face widths and heights, and how far its centre is above the face's."""
BODY_SIDE, BODY_ABOVE = 3.5, 1.2
"""A body's pixels are at most this many face widths beside the face's centre, and this many above it."""
DOWN_WEIGHT = 0.5
"""What a face width downwards counts against one sideways: people in front own the pixels below their faces."""
PERSON_THRESHOLD = 0.5
CLOSER_LOOK, CLOSER_LOOK_LOWER = (4.0, 2.25), 1.0
"""Half width and height of a look at one person in face widths, and how far its centre is below the face's."""
DEFAULT_SIZE = (256, 256)


@dataclass(frozen=True, eq=False)
class PersonSegmenter:
    """A model that marks every person's pixels: one picture with 3 channels in, one map out (NHWC or NCHW)."""

    model: OnnxModel
    channels_last: bool
    height: int
    width: int

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Probability of being a person, float32 ``[H, W]`` in [0, 1], of uint8 ``[H, W, 3]`` RGB."""
        small = Image.fromarray(image).resize((self.width, self.height), Image.Resampling.BILINEAR)
        batch = np.asarray(small, dtype=np.float32)[None] / 255
        output = self.model(batch if self.channels_last else batch.transpose(0, 3, 1, 2))[0]
        if output.size != self.height * self.width:
            raise ValueError(
                f"{self.model.path.name} gives {list(output.shape)} for one picture; wanted is a segmentation model "
                "with one map of persons as output, such as MediaPipe's selfie segmentation"
            )
        plane = output.reshape(self.height, self.width)
        if plane.min() < 0 or plane.max() > 1:
            plane = 1 / (1 + np.exp(-plane))
        plane = plane.astype(np.float32)
        size = (image.shape[1], image.shape[0])
        return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR))


def open_segmenter(path: Path, *, provider: str = "auto") -> PersonSegmenter:
    """Load a person segmentation model; ``ValueError`` when its input is no picture with 3 channels."""
    shapes = list(read_header(path).inputs.values())
    if len(shapes) != 1 or len(shapes[0]) != 4 or 3 not in (shapes[0][1], shapes[0][3]):
        raise ValueError(
            f"{path.name} takes {[list(shape) for shape in shapes]}; wanted is a segmentation model with one picture "
            "of 3 channels as input"
        )
    shape = shapes[0]
    channels_last = shape[3] == 3
    height, width = (shape[1], shape[2]) if channels_last else (shape[2], shape[3])
    return PersonSegmenter(
        load_model(path, provider), channels_last, height or DEFAULT_SIZE[0], width or DEFAULT_SIZE[1]
    )


def person_map(image: np.ndarray, faces: Sequence[Face], segmenter: PersonSegmenter) -> np.ndarray:
    """Probability of being a person, float32 ``[H, W]``: the whole picture and a closer look at each face's upper body.

    Segmentation models see little pictures, so the people of a group would be lost in one look at the whole.
    """
    height, width = image.shape[:2]
    person = segmenter(image).copy()
    for face in faces:
        x, y = face.center
        half_width, half_height = CLOSER_LOOK[0] * face.width, CLOSER_LOOK[1] * face.width
        y += CLOSER_LOOK_LOWER * face.width
        x0, x1 = (int(np.clip(value, 0, width)) for value in (x - half_width, x + half_width))
        y0, y1 = (int(np.clip(value, 0, height)) for value in (y - half_height, y + half_height))
        part = person[y0:y1, x0:x1]
        np.maximum(part, segmenter(image[y0:y1, x0:x1]), out=part)
    return person


def head_labels(faces: Sequence[Face], height: int, width: int) -> np.ndarray:
    """Label map of heads: an ellipse around each face, shared borders half way between neighbours."""
    return _nearest((_head_distance(face, height, width) for face in faces), height, width, reach=1.0)


def body_labels(faces: Sequence[Face], person: np.ndarray) -> np.ndarray:
    """Label map of whole people: the pixels of ``person`` ``[H, W]`` (in [0, 1]) shared among the faces, and heads.

    Each pixel goes to the face above it that is nearest in face widths; people without a found face stay background.
    """
    height, width = person.shape
    bodies = _nearest((_body_distance(face, height, width) for face in faces), height, width, reach=np.inf)
    bodies[person < PERSON_THRESHOLD] = BACKGROUND
    heads = head_labels(faces, height, width)
    return np.where(heads != BACKGROUND, heads, bodies)


def label_masks(labels: np.ndarray, people: int) -> np.ndarray:
    """One mask per person, float32 ``[people, H, W]`` of 0 and 1, from a label map."""
    return (labels[None] == np.arange(people, dtype=labels.dtype)[:, None, None]).astype(np.float32)


def _nearest(distances: Iterable[np.ndarray], height: int, width: int, *, reach: float) -> np.ndarray:
    labels = np.full((height, width), BACKGROUND, dtype=np.int16)
    best = np.full((height, width), reach, dtype=np.float32)
    for index, distance in enumerate(distances):
        closer = distance < best
        labels[closer] = index
        best[closer] = distance[closer]
    return labels


def _head_distance(face: Face, height: int, width: int) -> np.ndarray:
    x, y = face.center
    y -= HEAD_LIFT * face.height
    dx = (np.arange(width, dtype=np.float32) - x) / (HEAD_WIDTH * face.width)
    dy = (np.arange(height, dtype=np.float32) - y) / (HEAD_HEIGHT * face.height)
    return np.hypot(dx[None, :], dy[:, None])


def _body_distance(face: Face, height: int, width: int) -> np.ndarray:
    x, y = face.center
    dx = (np.arange(width, dtype=np.float32) - x) / face.width
    dy = (np.arange(height, dtype=np.float32) - y) / face.width
    dx[np.abs(dx) > BODY_SIDE] = np.inf
    dy[dy < -BODY_ABOVE] = np.inf
    return np.hypot(dx[None, :], DOWN_WEIGHT * dy[:, None])
