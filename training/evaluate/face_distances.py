"""The face fusion paper's three networks, through deepface in a process of its own; without one, not measured."""

from __future__ import annotations

import json
import logging
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .config import ScorerConfig
from .metrics import DEEPFACE
from .plan import Job

logger = logging.getLogger("fusedid")
WORKER = Path(__file__).with_name("deepface_worker.py")
MISSED = 1.0
"""Distance of a picture without a face: that of cosine 0."""


@dataclass(frozen=True, eq=False)
class Distances:
    """What deepface said: job key -> network -> distance 1 - cosine. Empty version: it was not asked."""

    version: str = ""
    by_key: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, job: Job) -> dict[str, float]:
        """The distances of a picture as columns of its record."""
        return {f"{DEEPFACE}{name}": value for name, value in self.by_key.get(_id(job), {}).items()}


def measure_distances(options: ScorerConfig, jobs: Sequence[Job], out: Path) -> Distances:
    """Distance of every picture of one person to that person's first reference, which is written to `references/`.

    Answers are kept in `deepface.jsonl`; what is known is not asked again. Raises ValueError when the interpreter
    cannot be started, stops, or answers something else.
    """
    if options.deepface_python is None:
        return Distances()
    kept = out / "deepface.jsonl"
    known = _kept(kept, options.deepface_networks)
    asked = [_question(job, out, options.deepface_networks) for job in jobs if _id(job) not in known.by_key]
    if not asked:
        return known
    logger.info("asking deepface about %d pictures", len(asked))
    version, answers = "", dict(known.by_key)
    with kept.open("a", encoding="utf-8") as file:
        for answer in _ask(options.deepface_python, asked):
            file.write(json.dumps({**answer, "networks": options.deepface_networks}) + "\n")
            version = answer.get("deepface", version)
            if "id" in answer:
                answers[answer["id"]] = _distances(answer, options.deepface_networks)
    missing = [entry["picture"] for entry in asked if entry["id"] not in answers]
    if missing or not version:
        raise ValueError(
            f"{options.deepface_python} stopped before it had answered everything ({len(missing)} pictures left, next "
            f"{Path(missing[0]).name if missing else '-'}); run the same command again to go on"
        )
    return Distances(version, answers)


def _id(job: Job) -> str:
    return f"{job.meant[0].name}:{job.key}"


def _question(job: Job, out: Path, networks: Sequence[str]) -> dict[str, Any]:
    reference = out / "references" / f"{job.unit:03d}-{job.meant[0].slug}.png"
    if not reference.is_file():
        reference.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(job.meant[0].photos[0].crop).save(reference)
    paths = {"picture": str(job.path.absolute()), "reference": str(reference.absolute())}
    return {"id": _id(job), **paths, "networks": list(networks)}


def _ask(python: str, questions: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The answers as they come, so that those before a crash are kept."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as asked:
        asked.writelines(json.dumps(question) + "\n" for question in questions)
        asked.seek(0)
        try:
            process = subprocess.Popen(
                [str(Path(python).expanduser()), str(WORKER)], stdin=asked, stdout=subprocess.PIPE, encoding="utf-8"
            )
        except OSError as error:
            raise ValueError(
                f"scorer.deepface_python: {python} cannot be started ({error.strerror}); give the path of a Python "
                "that has deepface installed, or null"
            ) from error
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                yield _parsed(python, line)
    if process.returncode:
        raise ValueError(
            f"scorer.deepface_python: {python} ended with code {process.returncode}; what it said stands above. Check "
            "that `python -c 'import deepface'` works there"
        )


def _parsed(python: str, line: str) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ValueError(f"scorer.deepface_python: {python} answered {line[:80]!r}, which is no JSON object")
    return answer


def _distances(answer: dict[str, Any], networks: Sequence[str]) -> dict[str, float]:
    if "distances" not in answer:
        return dict.fromkeys(networks, MISSED)
    return {name: float(value) for name, value in answer["distances"].items()}


def _kept(path: Path, networks: Sequence[str]) -> Distances:
    if not path.is_file():
        return Distances()
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    same = [answer for answer in answers if answer.get("networks") == list(networks)]
    versions = [answer["deepface"] for answer in same if "deepface" in answer]
    known = {answer["id"]: _distances(answer, networks) for answer in same if "id" in answer}
    return Distances(versions[-1] if versions else "", known)
