"""``report.md`` and ``report.json``: what was kept, what was dropped and why, what it looks like, how fast it went."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .examples import HISTOGRAMS, column_values, write_examples
from .find_faces import encoder_identity
from .index import Result
from .progress import StageTiming
from .reasons import ADVICE
from .stage import Context

PACKAGES = ("numpy", "pillow", "pyarrow", "onnxruntime", "opencv-python", "insightface", "torch", "diffusers")
EXAMPLES = 3


def write_report(context: Context, result: Result, timings: Sequence[StageTiming], list_shards: int) -> None:
    """Write the report's pictures, ``report.json`` and ``report.md``."""
    pictures = write_examples(context, result, list_shards)
    facts = collect(context, result, timings)
    context.output.write("report.json", (json.dumps(facts, indent=2) + "\n").encode())
    context.output.write("report.md", markdown(facts, pictures).encode())


def counts_by_reason(dropped: pa.Table) -> dict[str, int]:
    """{reason: number of inputs}, most frequent first."""
    counts = Counter(dropped["reason"].to_pylist())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def collect(context: Context, result: Result, timings: Sequence[StageTiming]) -> dict[str, Any]:
    """Everything the report says, as plain data."""
    index, dropped = result.index, result.dropped
    config = context.config
    return {
        "inputs": index.num_rows + dropped.num_rows,
        "kept": index.num_rows,
        "dropped": [
            {"reason": reason, "count": count, "examples": _examples(dropped, reason), "advice": ADVICE[reason]}
            for reason, count in counts_by_reason(dropped).items()
        ],
        "people": _people(result),
        "quantiles": _quantiles(result) if index.num_rows else {},
        "timings": [_timing(timing) for timing in timings],
        "face_encoder": encoder_identity(config.faces),
        "seed": config.split.seed,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def markdown(facts: dict[str, Any], pictures: Sequence[str]) -> str:
    """The report for people."""
    lines = ["# Data report", "", f"{facts['inputs']} inputs, **{facts['kept']} kept**."]
    if facts["dropped"]:
        lines += ["", "## Dropped", "", "Every one is in `dropped.parquet`.", ""]
        rows = [_dropped_row(entry, facts["inputs"]) for entry in facts["dropped"]]
        lines += _table(["reason", "count", "share", "what to do", "examples"], rows)
    people = facts["people"]
    if people:
        lines += ["", "## People", ""]
        lines.append(
            f"{people['people']} people, {people['with_several_photos']} of them with several photos; "
            f"{people['pairs']} same-person pairs; {people['non_human']} pictures without a face; "
            f"{people['captioned']} with a caption."
        )
        lines += ["", *_table(["split", "photos", "people"], [list(row) for row in people["splits"]])]
    if facts["quantiles"]:
        lines += ["", "## Numbers", ""]
        rows = [[name, *(f"{value:.4g}" for value in row)] for name, row in facts["quantiles"].items()]
        lines += _table(["kept pictures", "minimum", "5 %", "median", "95 %", "maximum"], rows)
    for name in pictures:
        lines += ["", f"![{name.rpartition('/')[2].partition('.')[0]}]({name})"]
    lines += ["", "## Speed of the last run", "", *_table(*_speed(facts["timings"])), "", "## Made with", ""]
    encoder = facts["face_encoder"]
    if encoder:
        lines.append(
            f"Face pack {encoder['name']} ({encoder['license']}), recogniser sha256 `{encoder['recogniser_sha256']}`, "
            f"{encoder['dim']} numbers. Split seed {facts['seed']}."
        )
    lines.append(", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    return "\n".join(lines) + "\n"


def _dropped_row(entry: dict[str, Any], inputs: int) -> list[Any]:
    keys = ", ".join(f"`{key}`" for key in entry["examples"])
    return [entry["reason"], entry["count"], f"{entry['count'] / inputs:.1%}", entry["advice"], keys]


def _examples(dropped: pa.Table, reason: str) -> list[str]:
    return dropped.filter(pc.equal(dropped["reason"], reason))["key"].slice(0, EXAMPLES).to_pylist()


def _people(result: Result) -> dict[str, Any]:
    index = result.index
    if not index.num_rows:
        return {}
    people = index["person"].to_pylist()
    splits = index["split"].to_pylist()
    counted = Counter(person for person in people if person is not None)
    return {
        "people": len(counted),
        "with_several_photos": sum(count > 1 for count in counted.values()),
        "pairs": result.pairs.num_rows,
        "non_human": people.count(None),
        "captioned": sum(bool(text) for text in index["caption"].to_pylist()),
        "splits": [
            [name, splits.count(name), len({person for person, split in zip(people, splits) if split == name} - {None})]
            for name in ("train", "val", "test")
        ],
    }


def _quantiles(result: Result) -> dict[str, list[float]]:
    found = {}
    for title, column in HISTOGRAMS.items():
        values = column_values(result, column)
        values = values[np.isfinite(values)]
        if len(values):
            found[title] = [float(value) for value in np.quantile(values, [0, 0.05, 0.5, 0.95, 1])]
    return found


def _timing(timing: StageTiming) -> dict[str, Any]:
    return {
        "stage": timing.stage,
        "shards": timing.shards,
        "reused": timing.reused,
        "pictures": timing.items,
        "seconds": round(timing.wall, 2),
        "per_second": round(timing.per_second, 2),
        "per_second_and_core": round(timing.per_second_and_core, 2),
    }


def _speed(timings: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    header = ["stage", "shards", "reused", "inputs", "seconds", "img/s", "img/s per core"]
    return header, [list(timing.values()) for timing in timings]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
