"""Stage ``identity``: who is on which picture, which pictures show the same person, and who belongs to which split."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from .clusters import cluster
from .config import IdentityConfig
from .reasons import dropped
from .splits import assign_splits
from .stage import Context, Stage
from .tables import DROP_FIELDS, FLOATS, Row, to_table

SCHEMA = pa.schema(
    [
        ("person", pa.string()),
        ("photos", pa.int32()),
        ("pairs", pa.list_(pa.string())),
        ("cosines", FLOATS),
        ("split", pa.string()),
        *DROP_FIELDS,
    ]
)


def identify(context: Context, tables: Mapping[str, pa.Table]) -> pa.Table:
    """One row per listed file: person, number of their photos, some same-person pairs, and the split."""
    config = context.config
    keys, sources = (tables["list"][name].to_pylist() for name in ("key", "source"))
    reasons = zip(*(tables[name]["reason"].to_pylist() for name in STAGE.needs), strict=True)
    usable = [place for place, dropped_by in enumerate(reasons) if not any(dropped_by)]
    human = tables["select"]["human"].to_pylist()
    faces = [place for place in usable if human[place]]
    embeddings = _embeddings(tables["select"], faces)
    sides = np.asarray(tables["select"]["face_side"].take(pa.array(faces, pa.int64())), dtype=np.float64)
    people = name_people(faces, embeddings, keys, sources, config.identity)
    rows: list[Row] = [{} for _ in keys]
    at = {place: number for number, place in enumerate(faces)}
    for name, members in people.items():
        numbers = [at[place] for place in members]
        _fill_person(rows, name, members, embeddings[numbers], sides[numbers], keys, config.identity)
    kept = [place for place in usable if not rows[place].get("reason")]
    owners = [rows[place].get("person") or keys[place] for place in kept]
    for place, split in zip(kept, assign_splits([keys[place] for place in kept], owners, config.split), strict=True):
        rows[place]["split"] = split
    return to_table(rows, SCHEMA)


def name_people(
    places: Sequence[int],
    embeddings: np.ndarray,
    keys: Sequence[str],
    sources: Sequence[str],
    config: IdentityConfig,
) -> dict[str, list[int]]:
    """Places of each person's photos, in order. A cluster is named after its first photo."""
    people: dict[str, list[int]] = defaultdict(list)
    if config.source == "embedding":
        labels = cluster(embeddings, config.threshold)
        names: dict[int, str] = {}
        for place, label in zip(places, labels.tolist(), strict=True):
            people[names.setdefault(label, keys[place])].append(place)
        return dict(people)
    for place in places:
        people[_given_name(keys[place], sources[place], config)].append(place)
    return dict(people)


def repeated_photos(embeddings: np.ndarray, sides: np.ndarray, limit: float) -> dict[int, int]:
    """{copy: kept photo} by row for one person's embeddings ``[N, D]``, of cosines above ``limit``.

    The photo with the largest face (``sides [N]``, pixels) stays.
    """
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.maximum(norms, 1e-6)
    kept: list[int] = []
    copies: dict[int, int] = {}
    for row in np.argsort(-sides, kind="stable").tolist():
        cosines = unit[kept] @ unit[row]
        if len(kept) and float(cosines.max()) > limit:
            copies[row] = kept[int(cosines.argmax())]
        else:
            kept.append(row)
    return copies


def _given_name(key: str, source: str, config: IdentityConfig) -> str:
    if config.source == "folder":
        folder = str(PurePosixPath(source.replace("::", "/")).parent)
        return key if folder == "." else folder
    match = re.search(config.regex or "", key)
    return match.group(1) if match and match.group(1) else key


def _fill_person(
    rows: list[Row],
    name: str,
    members: Sequence[int],
    embeddings: np.ndarray,
    sides: np.ndarray,
    keys: Sequence[str],
    config: IdentityConfig,
) -> None:
    copies = repeated_photos(embeddings, sides, config.duplicate_cosine) if config.duplicate_cosine < 1 else {}
    kept = [row for row in range(len(members)) if row not in copies]
    unit = embeddings.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    for row, place in enumerate(members):
        rows[place]["person"] = name
        if row in copies:
            rows[place] |= dropped("same_photo", f"the same photo as {keys[members[copies[row]]]}")
            continue
        others = [other for other in kept if other != row]
        # A fixed draw: the nearest photos would teach copying, the farthest may be mistakes.
        others.sort(key=lambda other: sha256(f"{keys[place]}|{keys[members[other]]}".encode()).digest())
        chosen = others[: config.max_pairs]
        rows[place] |= {
            "photos": len(kept),
            "pairs": [keys[members[other]] for other in chosen],
            "cosines": [round(float(unit[row] @ unit[other]), 4) for other in chosen],
        }


def _embeddings(selected: pa.Table, places: Sequence[int]) -> np.ndarray:
    if not places:
        return np.zeros((0, 1), dtype=np.float32)
    column = selected["embedding"].take(pa.array(places)).combine_chunks()
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(places), -1)


STAGE = Stage(
    "identity",
    2,
    ("list", "scan", "dedupe", "faces", "select", "captions"),
    SCHEMA,
    lambda config: [config.identity, config.split],
    whole=identify,
    columns={
        "list": ("key", "source", "reason"),
        "scan": ("reason",),
        "dedupe": ("reason",),
        "faces": ("reason",),
        "select": ("human", "embedding", "face_side", "reason"),
        "captions": ("reason",),
    },
)
