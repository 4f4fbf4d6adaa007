"""Stage ``faces``: boxes, five points, scores, sharpness and embeddings of all faces, by ``faces/``."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from faces.align import align_face
from faces.detect import find_faces
from faces.encoder import Face, FaceEncoder
from faces.quality import sharpness

from .config import FacesConfig
from .decode import DropError
from .reasons import alive, dropped
from .scan import load_again
from .stage import Context, Stage, Tables
from .tables import DROP_FIELDS, FLOATS, Row

SCHEMA = pa.schema(
    [
        ("count", pa.int32()),
        ("boxes", FLOATS),
        ("keypoints", FLOATS),
        ("scores", FLOATS),
        ("sharpness", FLOATS),
        ("embeddings", FLOATS),
        ("looks", pa.int32()),
        *DROP_FIELDS,
    ]
)


def open_face_encoder(config: FacesConfig) -> FaceEncoder:
    """The encoder the settings name, opened once per process. ``ValueError`` when it is not there."""
    return _open(config.pack, config.roots, config.det_size, config.provider)


def encoder_identity(config: FacesConfig) -> dict[str, object]:
    """What the index and every result record about the encoder; empty without one."""
    if config.pack == "none":
        return {}
    fingerprint = open_face_encoder(config).fingerprint
    return {
        "name": fingerprint.name,
        "backend": fingerprint.backend,
        "recogniser_sha256": fingerprint.recogniser_sha256,
        "detector_sha256": fingerprint.detector_sha256,
        "dim": fingerprint.dim,
        "license": fingerprint.license,
    }


def find_all_faces(context: Context, tables: Tables, shard: int) -> list[Row]:
    """One row per listed file. Recognition runs over the shard's faces in batches, detection picture by picture."""
    rows: list[Row] = []
    aligned: list[np.ndarray] = []
    for listed, scanned, unique in zip(tables["list"], tables["scan"], tables["dedupe"], strict=True):
        if not alive(listed, scanned, unique):
            rows.append({})
            continue
        row, faces = _one_picture(context, listed, scanned)
        rows.append(row)
        aligned += faces
    if aligned:
        encoder = open_face_encoder(context.config.faces)
        _distribute(rows, encoder.embed(np.stack(aligned)))
    return rows


def face_row(faces: tuple[Face, ...], looks: int) -> Row:
    """Faces, largest first, as flat lists of floats."""
    ordered = sorted(faces, key=lambda face: (-face.area, face.box))
    return {
        "count": len(ordered),
        "boxes": [float(value) for face in ordered for value in face.box],
        "keypoints": [float(value) for face in ordered for value in face.keypoints.reshape(-1)],
        "scores": [float(face.score) for face in ordered],
        "looks": looks,
    }


def _one_picture(context: Context, listed: Row, scanned: Row) -> tuple[Row, list[np.ndarray]]:
    if context.config.faces.pack == "none":
        return face_row((), 0), []
    try:
        pixels = load_again(context, listed, scanned["sha256"]).pixels
    except DropError as error:
        return dropped(error.reason, error.detail), []
    found = find_faces(pixels, open_face_encoder(context.config.faces))
    row = face_row(found.faces, found.looks)
    points = np.array(row["keypoints"], dtype=np.float32).reshape(-1, 5, 2)
    aligned = [align_face(pixels, face) for face in points]
    row["sharpness"] = [sharpness(face) for face in aligned]
    return row, aligned


def _distribute(rows: list[Row], embeddings: np.ndarray) -> None:
    start = 0
    for row in rows:
        count = row.get("count") or 0
        row["embeddings"] = embeddings[start : start + count].reshape(-1).tolist()
        start += count


def _model_hashes(config: FacesConfig) -> list[object]:
    """What decides the result: the same models under another name, or elsewhere, find the same faces."""
    identity = encoder_identity(config)
    return [identity.get("backend"), identity.get("detector_sha256"), identity.get("recogniser_sha256")]


@lru_cache(maxsize=2)
def _open(pack: str, roots: tuple[str, ...], det_size: int, provider: str) -> FaceEncoder:
    import faces.sessions
    from faces.pack_choice import open_encoder

    # Parallelism comes from processes; one thread each also keeps the sums independent of the number of cores.
    faces.sessions.MAX_THREADS = 1
    folders = [Path(root).expanduser() for root in roots]
    return open_encoder(pack, folders, det_size=det_size, provider=provider)


STAGE = Stage(
    "faces",
    1,
    ("list", "scan", "dedupe"),
    SCHEMA,
    lambda config: [config.faces.det_size, *_model_hashes(config.faces)],
    each=find_all_faces,
)
