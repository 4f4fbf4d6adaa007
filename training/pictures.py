"""Validation pictures: what the run can draw so far, and how alike the face is."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from faces.embed import SKIP, embed_faces
from faces.embedding import cosine
from faces.encoder import FaceEncoder
from faces.identity import mixed_embedding

from .base import BaseModel
from .config import TrainConfig
from .draw import DrawOptions, Person, draw
from .people import open_pack
from .source import Source
from .unet import FusedUNet
from .validation import chosen

logger = logging.getLogger("fusedid")


def draw_validation(
    base: BaseModel, model: FusedUNet, source: Source, config: TrainConfig, path: Path
) -> dict[str, float]:
    """Draws pictures of validation people beside their references into one file; returns the scores.

    `identity`: mean cosine between reference and picture, a picture without a face counts 0; `found`: share of pictures
    with a face. Both are absent without `validation.face_pack`. Seeds never change, so runs and steps compare.
    """
    indices = [i for i in chosen(len(source), len(source), config.seed) if source.record(i).has_face]
    indices = indices[: config.validation.pictures]
    pairs = []
    for number, index in enumerate(indices):
        picture = np.asarray(_one(base, model, source, config, index, number))
        pairs.append((source.face(index), picture))
    if pairs:
        path.parent.mkdir(parents=True, exist_ok=True)
        side_by_side(pairs).save(path)
    return face_scores(pairs, open_scorer(config))


def face_scores(pairs: list[tuple[np.ndarray, np.ndarray]], encoder: FaceEncoder | None) -> dict[str, float]:
    """Scores of (reference, picture) pairs; empty without an encoder or without pairs."""
    if encoder is None or not pairs:
        return {}
    found = [score for face, picture in pairs if (score := likeness(face, picture, encoder)) is not None]
    return {"identity": sum(found) / len(pairs), "found": len(found) / len(pairs)}


def open_scorer(config: TrainConfig) -> FaceEncoder | None:
    """The face pack that scores pictures, None when the configuration names none."""
    if config.validation.face_pack is None:
        return None
    return open_pack(config.validation.face_pack, config.validation.face_roots)


def _one(
    base: BaseModel, model: FusedUNet, source: Source, config: TrainConfig, index: int, number: int
) -> Image.Image:
    options = DrawOptions(
        prompt=source.record(index).caption,
        width=config.data.resolution,
        height=config.data.resolution,
        steps=config.validation.picture_steps,
        seed=number,
    )
    return draw(base, model, [Person((source.face(index),))], options)[0]


def likeness(face: np.ndarray, picture: np.ndarray, encoder: FaceEncoder) -> float | None:
    """Cosine between the largest faces of two pictures; None when either shows none."""
    try:
        found = [embed_faces([image], encoder, policy=SKIP).identity for image in (face, picture)]
    except ValueError:  # no usable face
        return None
    reference, drawn = (mixed_embedding(identity) for identity in found)
    return cosine(reference, drawn)


def side_by_side(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Image.Image:
    """One row per pair: reference left, picture right, both at the picture's height."""
    rows = []
    for face, picture in pairs:
        height = picture.shape[0]
        left = Image.fromarray(face).resize((height, height), Image.Resampling.LANCZOS)
        rows.append(np.concatenate([np.asarray(left), picture], axis=1))
    return Image.fromarray(np.concatenate(rows, axis=0))
