"""Stage ``select``: which pictures are good enough, and the main face of each. Anchors: TRAINING 3.3."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from .config import SelectConfig
from .reasons import alive, dropped
from .stage import Context, Stage, Tables
from .tables import DROP_FIELDS, FLOATS, Row

SCHEMA = pa.schema(
    [
        ("human", pa.bool_()),
        ("n_faces", pa.int32()),
        ("box", FLOATS),
        ("keypoints", FLOATS),
        ("score", pa.float32()),
        ("face_side", pa.float32()),
        ("face_area", pa.float32()),
        ("yaw", pa.float32()),
        ("sharpness", pa.float32()),
        ("norm", pa.float32()),
        ("embedding", FLOATS),
        *DROP_FIELDS,
    ]
)


def select(context: Context, tables: Tables, shard: int) -> list[Row]:
    """One row per listed file: what the main face is like, and the first filter it fails."""
    config = context.config.select
    return [
        _select_one(scanned, found, config) if alive(listed, scanned, unique, found) else {}
        for listed, scanned, unique, found in zip(*(tables[name] for name in STAGE.needs), strict=True)
    ]


def yaw_degrees(keypoints: np.ndarray) -> float:
    """Turn of the head in degrees from ``[5, 2]`` points, 0 facing the camera, 90 in profile, positive to the right.

    A pinhole far away sees the eyes at +-e*cos(yaw) and a nose that stands out by about e at e*sin(yaw).
    """
    left, right, nose = (keypoints[place].astype(np.float64) for place in range(3))
    axis = right - left
    distance = float(np.linalg.norm(axis))
    if distance < 1e-3:
        return 90.0
    offset = float(np.dot(nose - (left + right) / 2, axis)) / distance
    return float(np.degrees(np.arctan2(offset, distance / 2)))


def face_numbers(scanned: Row, found: Row) -> Row:
    """Columns that describe the main (largest) face."""
    x0, y0, x1, y1 = box = found["boxes"][:4]
    seen_width = min(x1, scanned["width"]) - max(x0, 0.0)
    seen_height = min(y1, scanned["height"]) - max(y0, 0.0)
    keypoints = found["keypoints"][:10]
    embedding = found["embeddings"][: len(found["embeddings"]) // found["count"]]
    return {
        "human": True,
        "box": box,
        "keypoints": keypoints,
        "score": found["scores"][0],
        "face_side": min(x1 - x0, y1 - y0),
        "face_area": max(0.0, seen_width) * max(0.0, seen_height) / (scanned["width"] * scanned["height"]),
        "yaw": yaw_degrees(np.array(keypoints).reshape(5, 2)),
        "sharpness": found["sharpness"][0],
        "norm": float(np.linalg.norm(embedding)),
        "embedding": embedding,
    }


def count_people(boxes: list[float], ignore_below: float) -> int:
    """Faces of at least ``ignore_below`` times the largest face's area."""
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    areas = np.prod(np.clip(corners[:, 2:] - corners[:, :2], 0, None), axis=1)
    return int(np.count_nonzero(areas >= ignore_below * areas.max(initial=0.0)))


def first_failure(row: Row, config: SelectConfig) -> Row | None:
    """The first filter that the main face fails, as drop columns."""
    checks = (
        (row["n_faces"] > config.max_faces, "too_many_faces", f"{row['n_faces']} faces"),
        (row["score"] < config.min_score, "low_score", f"score {row['score']:.2f}"),
        (row["face_side"] < config.min_face_side, "face_too_small", f"{row['face_side']:.0f} px"),
        (row["face_area"] < config.min_face_area, "face_area", f"{row['face_area']:.1%} of the picture"),
        (abs(row["yaw"]) > config.max_yaw, "pose", f"yaw {row['yaw']:.0f} degrees"),
        (row["sharpness"] < config.min_sharpness, "blurry", f"sharpness {row['sharpness']:.0f}"),
        (row["norm"] < config.min_norm, "low_norm", f"embedding length {row['norm']:.2f}"),
    )
    return next((dropped(reason, detail) for failed, reason, detail in checks if failed), None)


def _select_one(scanned: Row, found: Row, config: SelectConfig) -> Row:
    size = f"{scanned['width']}x{scanned['height']}"
    if min(scanned["width"], scanned["height"]) < config.min_side:
        return {"n_faces": found["count"], **dropped("too_small", size)}
    if not found["count"]:
        row: Row = {"human": False, "n_faces": 0}
        return row if config.no_face == "non_human" else row | dropped("no_face", f"{size}, {found['looks']} looks")
    row = face_numbers(scanned, found) | {"n_faces": count_people(found["boxes"], config.ignore_below)}
    return row | (first_failure(row, config) or {})


STAGE = Stage("select", 1, ("list", "scan", "dedupe", "faces"), SCHEMA, lambda config: config.select, each=select)
