"""An evaluation from protocol to results: people, pictures, records, rows, report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from faces.encoder import FaceEncoder
from training.config_io import dump_yaml
from training.people import open_pack
from training.references import Person
from training.result import git_revision, without_folders
from training.sample import TRAINING_FREE, Studio, open_studio

from .aggregate import by_row, comparisons, row_results
from .clip_score import ClipScorer
from .config import Protocol
from .drawing import draw_row, is_drawn, read_drawn, seconds_of, time_references, with_row
from .face_distances import Distances, measure_distances
from .people import Cast, likeness_scale, load_people
from .plan import Job, Row, check_slugs, make_row, plan_row
from .provenance import (
    adapter_facts,
    adapter_path,
    all_versions,
    base_files,
    command_line,
    encoder_facts,
    machine,
    protocol_hash,
)
from .report import write_report
from .scoring import Judge, Record, score_job
from .timing import fit_line

logger = logging.getLogger("fusedid")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMAT = 1


class Evaluation:
    """One protocol and its output folder. The base model is loaded only when a picture is missing."""

    def __init__(self, protocol: Protocol, out: Path, *, weights: str | None = None) -> None:
        check_slugs(list(protocol.rows))
        self.protocol, self.out = protocol, out
        self.device = _device(protocol.device)
        self.adapters = {name: adapter_path(row, weights) for name, row in protocol.rows.items()}
        self.precision = _precision(protocol.precision, self.device)
        self.base_files = base_files(protocol.model) if protocol.model.base else {}
        self.adapter_facts = _all_adapters(self.adapters)
        self.encoder: FaceEncoder = open_pack(protocol.scorer.face_pack, protocol.scorer.face_roots)
        self.clip = ClipScorer(protocol.scorer.clip, self.device) if protocol.scorer.clip else None
        most = max(row.references for row in protocol.rows.values())
        self.cast: Cast = load_people(protocol.people, self.encoder, references=most)
        self.rows = {name: make_row(protocol, name, self._made_by(name)) for name in protocol.rows}
        self.jobs = {name: plan_row(protocol, row, self.cast.subjects, out) for name, row in self.rows.items()}
        self._studio: Studio | None = None

    def run(self, command: Sequence[str] = ()) -> dict[str, Any]:
        """Draws, scores, reports; returns what `results.json` holds. Raises ValueError for what users can put right."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "protocol.yaml").write_text(dump_yaml(self.protocol), encoding="utf-8")
        for name, row in self.rows.items():
            self._draw(name, row)
        timing = self._timing()
        distances = measure_distances(self.protocol.scorer, self._single_person_jobs(), self.out)
        records = self._score(distances)
        _write_lines(self.out / "records.jsonl", records)
        results = self._results(records, distances, timing, command)
        (self.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        write_report(self.out, results, records, self.jobs)
        return results

    def _made_by(self, name: str) -> dict[str, Any]:
        return {
            "base": self.base_files,
            "adapter": self.adapter_facts[self.adapters[name]].get("sha256"),
            "precision": self.precision,
        }

    def _draw(self, name: str, row: Row) -> None:
        jobs = self.jobs[name]
        if row.config.pictures is not None or all(is_drawn(job) for job in jobs):
            return
        draw = self.protocol.draw
        try:
            draw_row(self.studio, row, jobs, self.adapters[name], batch=draw.batch, size=draw.reference_size)
        except ValueError as error:
            raise ValueError(f"row {name!r}: {error}") from error

    @property
    def studio(self) -> Studio:
        """The loaded base model."""
        if self._studio is None:
            size, dtype = self.protocol.draw.reference_size, DTYPES[self.precision]
            self._studio = open_studio(
                self.protocol.model, TRAINING_FREE, device=self.device, dtype=dtype, reference_size=size
            )
        return self._studio

    def _timing(self) -> dict[str, Any] | None:
        """The fit of a + b N for the protocol's row; measured again only when something about it changed."""
        options, path = self.protocol.timing, self.out / "timing.json"
        if options.row is None or not self.rows[options.row].config.shows_faces:
            return None
        row = self.rows[options.row]
        facts = [row.made_by, options.model_dump(mode="json"), row.options.width, row.options.height, row.options.steps]
        key = hashlib.sha256(json.dumps([facts, machine(self.device)], sort_keys=True).encode()).hexdigest()
        if path.is_file() and (known := json.loads(path.read_text(encoding="utf-8"))).get("key") == key:
            return known
        ready = with_row(self.studio, row.config, self.adapters[options.row], size=self.protocol.draw.reference_size)
        someone = self.cast.subjects[0]
        seconds = {
            n: time_references(ready, Person(someone.references(n)), row.options, repeats=options.repeats)
            for n in options.references
        }
        line = fit_line(seconds)
        found = {"key": key, "row": options.row, "seconds": seconds, **vars(line), "machine": machine(self.device)}
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return json.loads(json.dumps(found))

    def _single_person_jobs(self) -> list[Job]:
        return [job for jobs in self.jobs.values() for job in jobs if len(job.meant) == 1]

    def _score(self, distances: Distances) -> list[Record]:
        judge = Judge(self.encoder, self.cast.subjects, self.protocol.scorer.strangers, self.clip)
        records: list[Record] = []
        for name, jobs in self.jobs.items():
            logger.info("%s: scoring %d pictures", name, len(jobs))
            for job in jobs:
                scored = score_job(job, read_drawn(job), judge, seconds_of(job))
                records += [{**record, **distances.of(job)} for record in scored]
        return records

    def _results(
        self, records: list[Record], distances: Distances, timing: dict[str, Any] | None, command: Sequence[str]
    ) -> dict[str, Any]:
        protocol, rows = self.protocol, by_row(records)
        subjects = self.cast.subjects
        return {
            "fusedid.evaluation": FORMAT,
            "name": protocol.name,
            "command": command_line(command),
            "protocol": without_folders(protocol.model_dump(mode="json")),
            "protocol_hash": protocol_hash(protocol),
            "code_revision": git_revision(),
            "versions": all_versions(),
            "machine": machine(self.device),
            "models": {
                "base": self.base_files,
                "adapters": {name: self._adapter(name) for name in self.rows},
                "face_pack": encoder_facts(self.encoder),
                "clip": None if self.clip is None else {"name": self.clip.name, "files": self.clip.files},
                "deepface": distances.version or None,
            },
            "people": {
                "count": len(subjects),
                "names": [one.name for one in subjects],
                "photos": [len(one.photos) for one in subjects],
                "scale": likeness_scale(subjects),
                "held_out": sum(one.held_out is not None for one in subjects),
                "left_out": [list(entry) for entry in self.cast.left_out],
            },
            "rows": {name: row_results(rows[name], protocol.bootstrap) for name in rows},
            "comparisons": comparisons(protocol, rows),
            "timing": timing,
            "not_measured": self._not_measured(distances),
        }

    def _adapter(self, name: str) -> dict[str, Any]:
        elsewhere = self.protocol.rows[name].pictures is not None
        return {"name": "pictures drawn elsewhere"} if elsewhere else self.adapter_facts[self.adapters[name]]

    def _not_measured(self, distances: Distances) -> dict[str, str]:
        missing = {}
        if self.clip is None:
            missing["CLIP score"] = "scorer.clip names no CLIP folder"
        if not distances.version:
            missing["deepface distances"] = "scorer.deepface_python names no interpreter"
        if self.protocol.timing.row is None:
            missing["seconds per reference"] = "timing.row names no row"
        if not any(one.held_out for one in self.cast.subjects):
            missing["held-out photo, copy-paste"] = "nobody has a photo to hold out"
        return missing


def _all_adapters(paths: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Path -> facts; one ValueError that names every file which cannot be used."""
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for name, path in paths.items():
        try:
            found[path] = found.get(path) or adapter_facts(path)
        except ValueError as error:
            problems.append(f"row {name!r}: {error}")
    if problems:
        raise ValueError(
            "\n  ".join(["some rows have no adapter", *problems])
            + "\nGive --weights FOLDER, --set 'rows.<name>.adapter=FILE', or choose the other rows with --rows"
        )
    return found


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision(wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    return "fp16" if device.startswith("cuda") else "fp32"


def _write_lines(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
