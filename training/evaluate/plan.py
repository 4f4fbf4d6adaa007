"""Which pictures a row needs: who is shown, who is meant, prompt, noise, file, and what the picture depends on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attention.fusion import FaceControls
from faces.cache import picture_hash
from training.draw import DrawOptions, Shot
from training.references import Person

from .config import CAPTION, NO_FILE, THROUGH_VAE, TRAINING_FREE, Protocol, RowConfig
from .people import PICTURES, Subject, groups

SEEDS_PER_GROUP = 1000


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the protocol, ready to draw. `made_by` is everything its pictures depend on besides the shot."""

    name: str
    config: RowConfig
    options: DrawOptions
    made_by: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Job:
    """One picture. `meant`: whom it is scored against. `shown`: whose references are seen, the same but in controls.

    unit: number of the group of people; the bootstrap draws units. key: sha256 of all that the picture depends on.
    """

    row: Row
    unit: int
    meant: tuple[Subject, ...]
    shown: tuple[Subject, ...]
    prompt: str
    seed: int
    path: Path
    key: str

    @property
    def shot(self) -> Shot:
        """As the model draws it."""
        if not self.row.config.shows_faces:
            return Shot((), self.prompt, self.seed)
        masks: Sequence[np.ndarray | None] = (None,) * len(self.shown)
        if self.row.config.routed and len(self.shown) > 1:
            masks = bands(len(self.shown), self.row.options.height, self.row.options.width)
        count = self.row.config.references
        people = tuple(Person(one.references(count), mask=mask) for one, mask in zip(self.shown, masks))
        return Shot(people, self.prompt, self.seed)


def make_row(protocol: Protocol, name: str, made_by: dict[str, Any]) -> Row:
    """The row's settings filled up with the protocol's. made_by: names and hashes of base and adapter."""
    row, draw = protocol.rows[name], protocol.draw
    options = DrawOptions(
        negative=draw.negative,
        width=row.width or draw.width,
        height=row.height or draw.height,
        steps=draw.steps,
        guidance_scale=draw.guidance_scale,
        controls=FaceControls(strength=row.strength, value_strength=row.value_strength),
    )
    settings = row.model_dump(include={"combine", "timestep", "length"}) if row.shows_faces else {}
    kind = row.adapter if row.adapter in NO_FILE else "file"
    size = draw.reference_size if row.adapter == TRAINING_FREE else None
    return Row(name, row, options, {**made_by, **settings, "adapter_kind": kind, "reference_size": size})


def plan_row(protocol: Protocol, row: Row, subjects: Sequence[Subject], out: Path) -> list[Job]:
    """All pictures of a row, by group, prompt and seed. Raises ValueError when there are too few people."""
    if row.config.pictures is not None:
        return _found_pictures(row, subjects)
    parties = groups(subjects, row.config.people)
    if row.config.wrong_person and len(parties) < 2:
        raise ValueError(f"row {row.name!r} shows the next person's references, so it needs at least two people")
    first = protocol.draw.seed if row.config.seed is None else row.config.seed
    jobs = []
    for unit, meant in enumerate(parties):
        shown = parties[(unit + 1) % len(parties)] if row.config.wrong_person else meant
        for number, template in enumerate(row.config.prompts or protocol.draw.prompts):
            prompt = template.replace(CAPTION, meant[0].caption)
            for s in range(protocol.draw.seeds):
                seed = first + SEEDS_PER_GROUP * unit + s
                path = out / "pictures" / slug(row.name) / f"{unit:03d}-{meant[0].slug}-p{number}-s{s}.png"
                jobs.append(Job(row, unit, meant, shown, prompt, seed, path, _key(row, shown, prompt, seed)))
    return jobs


def slug(name: str) -> str:
    """A row's name as a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "row"


def check_slugs(names: Sequence[str]) -> None:
    """Raises ValueError when two rows would write into the same folder."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(slug(name).lower(), name)
        if other != name:
            raise ValueError(f"the rows {other!r} and {name!r} would share one folder; give them more different names")


def bands(count: int, height: int, width: int) -> list[np.ndarray]:
    """`count` masks float32 `[height, width]`: equal upright bands from left to right, every pixel in exactly one."""
    edges = [round(width * number / count) for number in range(count + 1)]
    masks = [np.zeros((height, width), dtype=np.float32) for _ in range(count)]
    for mask, left, right in zip(masks, edges, edges[1:]):
        mask[:, left:right] = 1.0
    return masks


def _found_pictures(row: Row, subjects: Sequence[Subject]) -> list[Job]:
    root = Path(row.config.pictures or "").expanduser()
    jobs = []
    for unit, one in enumerate(subjects):
        folder = root / one.name
        for path in sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES):
            key = hashlib.sha256(path.read_bytes()).hexdigest()
            jobs.append(Job(row, unit, (one,), (one,), "", -1, path, key))
    if not jobs:
        raise ValueError(
            f"row {row.name!r}: pictures: {root} holds no folder with pictures for any of the people; name the "
            f"sub-folders as the people are called, for example {root / subjects[0].name}"
        )
    return jobs


def _key(row: Row, shown: Sequence[Subject], prompt: str, seed: int) -> str:
    options, config = row.options, row.config
    facts: dict[str, Any] = {
        **row.made_by,
        "draw": [options.width, options.height, options.steps, options.guidance_scale, options.negative, prompt, seed],
    }
    if config.shows_faces or config.adapter == THROUGH_VAE:
        crops = [[picture_hash(crop) for crop in one.references(config.references)] for one in shown]
        facts["faces"] = [crops, config.routed, config.strength]
        if config.value_strength != 1:
            facts["value_strength"] = config.value_strength
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
