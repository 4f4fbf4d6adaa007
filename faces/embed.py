"""The one public way from photos of a person to an :class:`Identity`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .align import DEFAULT_MARGIN, align_face, crop_square, transform_points, whole_square
from .cache import embed_cached, find_faces_cached
from .detect import Detections
from .encoder import Face, FaceEncoder
from .identity import Identity, Reference, mixed_embedding
from .mix import require_encoder
from .pictures import as_rgb_batch
from .quality import Quality, QualityGate, gate_problem, measure_quality
from .select import LARGEST, MOST_SIMILAR, order_faces, pick_face, similarities_to

ERROR, SKIP, WHOLE = "error", "skip image", "whole image"
POLICIES = (ERROR, SKIP, WHOLE)


@dataclass(frozen=True, eq=False)
class ImageReport:
    """What happened to one picture."""

    number: int
    """From 1."""
    detections: Detections
    order: tuple[int, ...]
    """Indices of the faces in the order in which they are numbered for the user."""
    chosen: int | None
    """Index of the face that was used."""
    quality: Quality | None
    problem: str
    """Why the picture gave no face; empty when it did."""
    used: bool
    """Whether the picture is among the identity's references."""


@dataclass(frozen=True, eq=False)
class Embedded:
    identity: Identity
    reports: tuple[ImageReport, ...]


@dataclass(frozen=True, eq=False)
class _Request:
    encoder: FaceEncoder
    which: str
    number: int
    like: Identity | None
    gate: QualityGate
    det_size: int | None


def embed_faces(
    images: Sequence[np.ndarray],
    encoder: FaceEncoder,
    *,
    which: str = LARGEST,
    index: int = 1,
    like: Identity | None = None,
    policy: str = ERROR,
    gate: QualityGate | None = None,
    weights: Sequence[float] = (),
    margin: float = DEFAULT_MARGIN,
    det_size: int | None = None,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """One identity from pictures of one person (any array that :func:`faces.pictures.as_rgb` takes).

    ``which`` and ``index`` (from 1) choose the face in each picture; ``most similar`` compares with ``like``. A picture
    without a usable face follows ``policy``: ``error``, ``skip image``, or ``whole image`` (the picture itself without
    an embedding; a face that fails ``gate`` is skipped instead). ``weights``: one per picture, or none for equal ones.
    ``progress`` is called with (done, all). Raises ``ValueError`` naming the picture and the remedy.
    """
    _check_options(policy, encoder, like)
    pictures = as_rgb_batch(images)
    shares = _weights(weights, len(pictures))
    request = _Request(encoder, which, index, like, gate or QualityGate(), det_size)
    chosen: list[ImageReport] = []
    for number, picture in enumerate(pictures, start=1):
        chosen.append(_choose(picture, number, request))
        _follow_error_policy(chosen[-1], policy)
        if progress is not None:
            progress(number, len(pictures))
    _embed_together(pictures, chosen, encoder)
    references: list[Reference] = []
    reports: list[ImageReport] = []
    for picture, report, weight in zip(pictures, chosen, shares):
        reference = _reference(picture, report, policy, encoder, margin)
        if reference is not None:
            references.append(replace(reference, weight=weight))
        reports.append(replace(report, used=reference is not None))
    if not references:
        problems = "; ".join(f"picture {report.number}: {report.problem}" for report in reports)
        raise ValueError(f"no picture has a usable face ({problems}); use photos in which the face is clearly visible")
    return Embedded(Identity(tuple(references), encoder.fingerprint, name), tuple(reports))


def report_text(embedded: Embedded, provider: str) -> str:
    """The result for people: encoder, then one line per picture."""
    identity = embedded.identity
    count = len(identity.references)
    head = f"{count} reference{'' if count == 1 else 's'}, encoder {identity.encoder}, on {provider}"
    return "\n".join([head, f"licence of the face models: {identity.encoder.license}", *map(_line, embedded.reports)])


def _line(report: ImageReport) -> str:
    count = len(report.detections.faces)
    text = f"picture {report.number}: {count} face{'' if count == 1 else 's'}"
    if report.detections.found_by is not None:
        text += f" (seen at {report.detections.found_by})"
    if report.chosen is not None and not report.problem:
        return f"{text}, used number {report.order.index(report.chosen) + 1}: {report.quality}"
    return f"{text}, {'used whole' if report.used else 'skipped'}: {report.problem}"


def _check_options(policy: str, encoder: FaceEncoder, like: Identity | None) -> None:
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r} for pictures without a face; choose one of {', '.join(POLICIES)}")
    if encoder.fingerprint.dim == 0:
        # The backend knows which file is missing and says so.
        encoder.embed(np.zeros((1, 112, 112, 3), dtype=np.uint8))
    if like is not None:
        require_encoder(like, encoder.fingerprint)


def _weights(weights: Sequence[float], count: int) -> list[float]:
    if len(weights) == 0:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(
            f"got {len(weights)} weights for {count} pictures; give one weight per picture, or none for equal ones"
        )
    return [float(weight) for weight in weights]


def _choose(picture: np.ndarray, number: int, request: _Request) -> ImageReport:
    detections = find_faces_cached(picture, request.encoder, det_size=request.det_size)
    empty = ImageReport(number, detections, (), None, None, "", False)
    if not detections.faces:
        return replace(empty, problem=f"no face found after {detections.looks} looks at several sizes and paddings")
    order = tuple(order_faces(detections.faces, request.which, _similarities(picture, detections, request)))
    try:
        chosen = pick_face(order, request.number)
    except ValueError as error:
        return replace(empty, order=order, problem=str(error))
    face = detections.faces[chosen]
    quality = measure_quality(face, align_face(picture, face.keypoints))
    problem = gate_problem(quality, request.gate) or ""
    return replace(empty, order=order, chosen=chosen, quality=quality, problem=problem)


def _similarities(picture: np.ndarray, detections: Detections, request: _Request) -> list[float] | None:
    if request.which != MOST_SIMILAR or request.like is None:
        return None
    aligned = [align_face(picture, face.keypoints) for face in detections.faces]
    return similarities_to(mixed_embedding(request.like), np.stack(embed_cached(aligned, request.encoder)))


def _follow_error_policy(report: ImageReport, policy: str) -> None:
    if report.problem and policy == ERROR:
        raise ValueError(
            f"picture {report.number}: {report.problem}. Use another picture, or set the no-face policy to '{SKIP}' or "
            f"'{WHOLE}'"
        )


def _embed_together(pictures: Sequence[np.ndarray], reports: Sequence[ImageReport], encoder: FaceEncoder) -> None:
    """One batch for the recogniser; from here on the embeddings are remembered."""
    aligned = [
        align_face(picture, report.detections.faces[report.chosen].keypoints)
        for picture, report in zip(pictures, reports)
        if report.chosen is not None and not report.problem
    ]
    embed_cached(aligned, encoder)


def _reference(
    picture: np.ndarray, report: ImageReport, policy: str, encoder: FaceEncoder, margin: float
) -> Reference | None:
    if not report.problem and report.chosen is not None:
        return face_reference(picture, report.detections.faces[report.chosen], encoder, margin=margin)
    if policy == WHOLE and not report.detections.faces:
        return Reference(crop=whole_square(picture), embedding=None, keypoints=None, score=0.0)
    return None


def face_reference(
    picture: np.ndarray, face: Face, encoder: FaceEncoder, *, margin: float = DEFAULT_MARGIN
) -> Reference:
    """The reference (crop, embedding, key points, aligned face) of one found face in uint8 ``[H, W, 3]`` RGB."""
    aligned = align_face(picture, face.keypoints)
    crop, to_crop = crop_square(picture, face.box, margin=margin)
    embedding = embed_cached([aligned], encoder)[0]
    return Reference(crop, embedding, transform_points(face.keypoints, to_crop), face.score, aligned=aligned)
