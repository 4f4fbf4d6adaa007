"""One picture against the people it stands for: a record per person, with everything that is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from faces.align import align_face
from faces.embedding import cosine
from faces.encoder import FaceEncoder
from faces.similarity import PictureScore, confidence, leakage, score_pictures, separation

from .clip_score import ClipScorer
from .copy_paste import copy_paste
from .people import Subject
from .pixel_metrics import psnr, psnr_wrapped_uint8, ssim
from .plan import Job

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Judge:
    """What scores: the face pack, everybody's first embedding for the strangers, and CLIP where it is there."""

    encoder: FaceEncoder
    subjects: tuple[Subject, ...]
    num_strangers: int
    clip: ClipScorer | None = None

    def strangers(self, job: Job) -> np.ndarray:
        """Embeddings `[S, D]` of people who are neither meant nor shown in the picture."""
        present = {one.name for one in (*job.meant, *job.shown)}
        others = [one.photos[0].embedding for one in self.subjects if one.name not in present][: self.num_strangers]
        return np.stack(others) if others else np.zeros((0, self.encoder.fingerprint.dim), dtype=np.float32)


def score_job(job: Job, picture: np.ndarray, judge: Judge, seconds: float | None) -> list[Record]:
    """A record per person who is meant; uint8 `[H, W, 3]`.

    Who is not found has 0 in every cosine (`identity`, `identity_multi`, `held_out`), and null in what needs a face.
    """
    fingerprint = judge.encoder.fingerprint
    score = score_pictures([picture], judge.encoder, [one.identity(fingerprint) for one in job.meant])[0]
    shared: Record = {
        "row": job.row.name,
        "picture": f"{job.path.parent.name}/{job.path.name}",
        "unit": job.unit,
        "prompt": job.prompt,
        "seed": job.seed,
        "seconds": seconds,
        "faces": len(score.faces),
        "count_right": float(len(score.faces) == len(job.meant)),
        "clip": None if judge.clip is None or not job.prompt else judge.clip(picture, job.prompt),
    }
    strangers = judge.strangers(job)
    records = []
    for number, one in enumerate(job.meant):
        own = {**_of_person(job, score, number, strangers), **_of_face(job, score, number, picture)}
        records.append({**shared, "person": one.name, **own})
    return records


def _of_person(job: Job, score: PictureScore, number: int, strangers: np.ndarray) -> Record:
    """Cosines. The ones over several people are null in pictures of one."""
    one, drawn = job.meant[number], score.embedding_of(number)
    found = drawn is not None
    several = [_cosine(drawn, photo.embedding) for photo in one.photos[: job.row.config.references]]
    return {
        "found": float(found),
        "identity": score.cosines[number],
        "identity_found": score.cosines[number] if found else None,
        "identity_multi": float(np.mean(several)) if len(several) > 1 else None,
        "held_out": None if one.held_out is None else _cosine(drawn, one.held_out.embedding),
        "identity_shown": _cosine(drawn, job.shown[number].photos[0].embedding) if job.shown != job.meant else None,
        "separation": separation(score, number),
        "leakage": leakage(score, number, strangers),
        "confidence": confidence(score, number),
    }


def _of_face(job: Job, score: PictureScore, number: int, picture: np.ndarray) -> Record:
    """What needs a face: aligned crops beside the first reference, copy-paste, and its place in the picture."""
    one, index = job.meant[number], score.chosen[number]
    bands = len(job.meant) > 1 and job.row.config.routed and job.row.config.shows_faces
    place = _in_place(score, number, picture.shape[1]) if bands else None
    if index is None:
        return {"ssim": None, "psnr": None, "psnr_wrapped": None, "copy_paste": None, "in_place": place}
    aligned, wanted = align_face(picture, score.faces[index].keypoints), one.photos[0].aligned
    copied = None
    if one.held_out is not None:
        copied = copy_paste(score.embeddings[index], one.held_out.embedding, one.photos[0].embedding)
    return {
        "ssim": ssim(aligned, wanted),
        "psnr": min(psnr(aligned, wanted), 100.0),
        "psnr_wrapped": min(psnr_wrapped_uint8(aligned, wanted), 100.0),
        "copy_paste": copied,
        "in_place": place,
    }


def _in_place(score: PictureScore, number: int, width: int) -> float:
    """1 when the face's centre lies in the person's upright band; 0 elsewhere, and for who is not found."""
    index = score.chosen[number]
    if index is None:
        return 0.0
    band = int(score.faces[index].center[0] * len(score.chosen) / width)
    return float(band == number)


def _cosine(drawn: np.ndarray | None, wanted: np.ndarray) -> float:
    return 0.0 if drawn is None else cosine(drawn, wanted)
