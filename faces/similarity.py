"""How much the people in pictures look like given identities: the best assignment of faces to people per picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .align import align_face
from .cache import embed_cached, find_faces_cached
from .embedding import cosine_matrix
from .encoder import Face, FaceEncoder
from .identity import Identity, mixed_embedding
from .mix import require_encoder
from .pictures import as_rgb_batch


@dataclass(frozen=True, eq=False)
class PictureScore:
    """One picture compared with every identity."""

    faces: tuple[Face, ...]
    chosen: tuple[int | None, ...]
    """Per identity the index of its face; None when there are fewer faces than identities."""
    cosines: tuple[float, ...]
    """Per identity the cosine to its face, in [-1, 1]; 0 without one, so that a missing person lowers the mean."""
    table: np.ndarray
    """float ``[identities, faces]``: every cosine, also of faces that were not chosen."""
    embeddings: np.ndarray
    """float32 ``[faces, D]``, raw."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.cosines))

    def embedding_of(self, identity: int) -> np.ndarray | None:
        """Raw embedding ``[D]`` of the face that stands for an identity; None when it has none."""
        face = self.chosen[identity]
        return None if face is None else self.embeddings[face]


def score_pictures(
    images: Sequence[np.ndarray], encoder: FaceEncoder, identities: Sequence[Identity]
) -> list[PictureScore]:
    """Compare each picture's faces with the identities; each face stands for at most one identity.

    Raises ``ValueError`` for no identity, identities of another encoder, or bad pictures.
    """
    if not identities:
        raise ValueError("got no identity to compare with; connect at least one")
    for identity in identities:
        require_encoder(identity, encoder.fingerprint)
    wanted = np.stack([mixed_embedding(identity) for identity in identities])
    return [_score(picture, encoder, wanted) for picture in as_rgb_batch(images)]


def best_first(scores: Sequence[PictureScore], minimum: float) -> list[int]:
    """Indices of the pictures from most to least alike; those with a mean below ``minimum`` are left out, never all."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index].mean)
    return [index for index in order if scores[index].mean >= minimum] or order[:1]


def score_report(scores: Sequence[PictureScore], names: Sequence[str]) -> str:
    """The mean of everything, then one line per picture."""
    overall = float(np.mean([score.mean for score in scores]))
    lines = [f"mean similarity {overall:.3f} over {len(scores)} picture{'' if len(scores) == 1 else 's'}"]
    for number, score in enumerate(scores, start=1):
        people = [
            f"{name} {value:.3f}" if face is not None else f"{name} not found"
            for name, value, face in zip(names, score.cosines, score.chosen)
        ]
        lines.append(f"picture {number} ({len(score.faces)} faces): {', '.join(people)}")
    return "\n".join(lines)


def score_table(scores: Sequence[PictureScore], names: Sequence[str]) -> str:
    """The same as comma-separated values with a header: picture, identity, found, cosine."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", "identity", "found", "cosine"])
    for number, score in enumerate(scores, start=1):
        for name, value, face in zip(names, score.cosines, score.chosen):
            writer.writerow([number, name, int(face is not None), f"{value:.4f}"])
    return text.getvalue()


def separation(score: PictureScore, identity: int) -> float | None:
    """Diagonal minus off-diagonal: the identity's cosine to its own face minus the mean of the others' to that face.

    Below 0 the face looks more like the others. None without a face, or when there is only one identity.
    """
    face, others = score.chosen[identity], _others(score, identity)
    if face is None or not others:
        return None
    return float(score.table[identity, face] - score.table[others, face].mean())


def leakage(score: PictureScore, identity: int, strangers: np.ndarray) -> float | None:
    """How much of the other people in the picture is in one person's face, beyond what any stranger is.

    The mean cosine of the face to the other identities minus its mean cosine to ``strangers``, embeddings ``[S, D]`` of
    people who are not in the picture. 0: no more alike than strangers are. None without a face, others or strangers.
    """
    own, others = score.embedding_of(identity), _others(score, identity)
    if own is None or not others or not len(strangers):
        return None
    towards_others = float(score.table[others, score.chosen[identity]].mean())
    return towards_others - float(cosine_matrix(own[None], strangers).mean())


def confidence(score: PictureScore, identity: int) -> float | None:
    """XVerse's ID-Conf: ``clip(1 - second / best, 0, 1)`` over the cosines of an identity's face to all identities.

    1: the face is like one identity only. None without a face or with one identity.
    """
    face = score.chosen[identity]
    if face is None or len(score.chosen) < 2:
        return None
    second, best = np.sort(score.table[:, face])[-2:]
    return float(np.clip(1 - second / best, 0, 1)) if best > 0 else 0.0


def _others(score: PictureScore, identity: int) -> list[int]:
    return [other for other in range(len(score.chosen)) if other != identity]


def _score(picture: np.ndarray, encoder: FaceEncoder, wanted: np.ndarray) -> PictureScore:
    from scipy.optimize import linear_sum_assignment

    faces = find_faces_cached(picture, encoder).faces
    chosen: list[int | None] = [None] * len(wanted)
    cosines = [0.0] * len(wanted)
    table = np.zeros((len(wanted), len(faces)), dtype=np.float32)
    embeddings = np.zeros((0, wanted.shape[1]), dtype=np.float32)
    if faces:
        aligned = [align_face(picture, face.keypoints) for face in faces]
        embeddings = np.stack(embed_cached(aligned, encoder))
        table = cosine_matrix(wanted, embeddings)
        for person, face in zip(*linear_sum_assignment(table, maximize=True)):
            chosen[person], cosines[person] = int(face), float(table[person, face])
    return PictureScore(faces, tuple(chosen), tuple(cosines), table, embeddings)
