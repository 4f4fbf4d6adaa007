"""The people of an evaluation: reference photos that are shown, and one photo that no picture was made from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from faces.embed import SKIP, embed_faces
from faces.embedding import cosine, cosine_matrix
from faces.encoder import FaceEncoder
from faces.identity import EncoderFingerprint, Identity, Reference
from training.augment import augmented_reference
from training.config import AugmentConfig
from training.people import read_picture
from training.randomness import generator
from training.shards import ShardSource

from .config import PeopleConfig

logger = logging.getLogger("fusedid")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FURTHER_CROPS = AugmentConfig()
"""How further references are made for people with too few photos: as training changes its references."""


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo with a face.

    crop: uint8 `[S, S, 3]`, what a model is shown. aligned: uint8 `[112, 112, 3]`. embedding: raw, float32 `[D]`.
    """

    name: str
    crop: np.ndarray
    aligned: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True, eq=False)
class Subject:
    """One person. `photos` may be shown to a model, `held_out` never is; the caption is empty for plain folders."""

    name: str
    photos: tuple[Photo, ...]
    held_out: Photo | None = None
    caption: str = ""

    def references(self, count: int) -> tuple[np.ndarray, ...]:
        """`count` crops: the photos, then changed crops (flip, cut, colour) of them in turn, always the same ones."""
        crops = [photo.crop for photo in self.photos[:count]]
        for number in range(len(crops), count):
            gen = generator("evaluate", self.name, number)
            crops.append(augmented_reference(self.photos[number % len(self.photos)].crop, FURTHER_CROPS, gen))
        return tuple(crops)

    def identity(self, encoder: EncoderFingerprint) -> Identity:
        """The first photo as `faces.similarity` compares with it."""
        first = self.photos[0]
        return Identity((Reference(first.crop, first.embedding, None, 1.0),), encoder, self.name)

    @property
    def slug(self) -> str:
        """The name as a part of a file name."""
        return re.sub(r"[^\w-]+", "_", self.name)[-60:]


@dataclass(frozen=True, eq=False)
class Cast:
    """Everybody who takes part, and who could not: (name, reason)."""

    subjects: tuple[Subject, ...]
    left_out: tuple[tuple[str, str], ...]


def load_people(options: PeopleConfig, encoder: FaceEncoder, *, references: int) -> Cast:
    """The first `options.count` people in whose photos the scorer finds a face, with up to `references` photos each.

    Raises ValueError for a missing or empty folder, and when no face is found in anybody's photos.
    """
    found: list[Subject] = []
    left_out: list[tuple[str, str]] = []
    for name, candidate in _candidates(options, encoder, references):
        if options.count and len(found) == options.count:
            break
        if isinstance(candidate, str):
            logger.warning("%s is left out: %s", name, candidate)
            left_out.append((name, candidate))
        else:
            found.append(candidate)
    if not found:
        raise ValueError(
            f"no face was found in the photos of any of {len(left_out)} people ({options.photos or options.data}); "
            "give a folder of clear portraits, or another scorer.face_pack"
        )
    return Cast(tuple(found), tuple(left_out))


def groups(subjects: Sequence[Subject], size: int) -> list[tuple[Subject, ...]]:
    """Disjoint groups of `size` people in order; who is left over at the end is in none.

    Raises ValueError when there are fewer people than one group needs.
    """
    if len(subjects) < size:
        raise ValueError(
            f"a row draws {size} people per picture, but there are only {len(subjects)}; raise people.count, give more "
            "people, or leave the row out with --rows"
        )
    return [tuple(subjects[start : start + size]) for start in range(0, len(subjects) - size + 1, size)]


def likeness_scale(subjects: Sequence[Subject]) -> dict[str, float | None]:
    """What a cosine means here: the mean between two photos of one person, and between first photos of strangers."""
    same = [cosine(one.photos[0].embedding, one.held_out.embedding) for one in subjects if one.held_out]
    table = cosine_matrix(*[np.stack([one.photos[0].embedding for one in subjects])] * 2)
    strangers = table[~np.eye(len(subjects), dtype=bool)]
    return {
        "two photos of one person": float(np.mean(same)) if same else None,
        "strangers": float(strangers.mean()) if len(strangers) else None,
    }


def _candidates(options: PeopleConfig, encoder: FaceEncoder, references: int) -> Iterator[tuple[str, Subject | str]]:
    if options.photos is not None:
        for name, paths in _folder(Path(options.photos).expanduser()):
            yield name, _from_files(name, paths, options, encoder, references)
    else:
        assert options.data is not None
        source = ShardSource(options.data, options.split)
        for name, indices in _people_of(source):
            yield name, _from_samples(name, indices, source, options, encoder, references)


def _folder(root: Path) -> list[tuple[str, list[Path]]]:
    """(person, photos), both in name order: sub-folders are people with several photos, loose files with one."""
    if not root.is_dir():
        raise ValueError(f"people.photos: {root} is no folder; give one with a sub-folder or one photo per person")
    people = []
    for entry in sorted(root.iterdir()):
        photos = sorted(_pictures_in(entry)) if entry.is_dir() else [entry] * (entry.suffix.lower() in PICTURES)
        if photos:
            people.append((entry.name if entry.is_dir() else entry.stem, photos))
    if not people:
        raise ValueError(f"people.photos: {root} holds no pictures ({', '.join(PICTURES)})")
    return people


def _pictures_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]


def _people_of(source: ShardSource) -> Iterator[tuple[str, list[int]]]:
    """(key of the person's first sample, the person's samples), in the order of the index."""
    seen: set[int] = set()
    for index in range(len(source)):
        if index in seen or not source.row(index)["human"]:
            continue
        same = [index, *source.same_person(index)]
        seen.update(same)
        yield source.row(index)["key"], sorted(same)


def _from_files(
    name: str, paths: list[Path], options: PeopleConfig, encoder: FaceEncoder, references: int
) -> Subject | str:
    photos = []
    for path in _chosen(paths, options, references):
        photo = _photo(path.name, [read_picture(path)], None, options, encoder)
        photos += [photo] if photo else []
    return _subject(name, photos, options)


def _from_samples(
    name: str, indices: list[int], source: ShardSource, options: PeopleConfig, encoder: FaceEncoder, references: int
) -> Subject | str:
    photos = []
    for index in _chosen(indices, options, references):
        crop = source.face(index)
        photo = _photo(source.row(index)["key"], [crop, source.picture(index)], crop, options, encoder)
        photos += [photo] if photo else []
    return _subject(name, photos, options, caption=source.record(indices[0]).caption)


def _chosen(items: list, options: PeopleConfig, references: int) -> list:
    """Enough for the references, and the last one where it is held out."""
    if options.held_out and len(items) > 1:
        return [*items[:-1][:references], items[-1]]
    return items[:references]


def _photo(
    name: str, views: list[np.ndarray], crop: np.ndarray | None, options: PeopleConfig, encoder: FaceEncoder
) -> Photo | None:
    """The first view in which the scorer finds a face; None when there is none."""
    for view in views:
        try:
            found = embed_faces([view], encoder, policy=SKIP, margin=options.margin).identity.references[0]
        except ValueError:  # no usable face
            continue
        assert found.aligned is not None and found.embedding is not None
        return Photo(name, found.crop if crop is None else crop, found.aligned, found.embedding)
    return None


def _subject(name: str, photos: list[Photo], options: PeopleConfig, *, caption: str = "") -> Subject | str:
    if not photos:
        return "no face found in any photo"
    if options.held_out and len(photos) > 1:
        return Subject(name, tuple(photos[:-1]), photos[-1], caption)
    return Subject(name, tuple(photos), None, caption)
