"""`python -m training.evaluate.table RESULTS.json`: the numbers of an evaluation as Markdown tables."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .metrics import DEEPFACE, METRICS, metric

logger = logging.getLogger("fusedid")
OF_SEVERAL = ("separation", "leakage", "confidence", "in_place", "count_right")
NOT_IN_TABLES = ("count_right", "seconds")
Results = Mapping[str, Any]


def read_results(path: Path | str) -> dict[str, Any]:
    """What `results.json` holds. Raises ValueError when the file is missing or something else."""
    try:
        results = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({error}); give a results.json of training.evaluate"
        ) from error
    if not isinstance(results, dict) or results.get("fusedid.evaluation") != 1:
        raise ValueError(f"{path} is no results.json of this version of python -m training.evaluate; run it again")
    return results


def results_table(results: Results) -> str:
    """Rows of one person per picture, then rows of several, then what each has beyond its baseline."""
    parts = [row_table(results, several=False), row_table(results, several=True), difference_table(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def row_table(results: Results, *, several: bool) -> str:
    """A line per row, a column per metric that any of them has; empty when there is no such row."""
    rows = {name: row for name, row in results["rows"].items() if (_people(results, name) > 1) == several}
    present = {name for row in rows.values() for name in row["metrics"]}
    columns = [m.name for m in METRICS if m.name in present and m.name not in NOT_IN_TABLES]
    columns = [name for name in columns if several or name not in OF_SEVERAL]
    columns += sorted(name for name in present if name.startswith(DEEPFACE))
    if several and "count_right" in present:
        columns.append("count_right")
    if not rows:
        return ""
    header = ["row", "pictures", *(metric(name).label for name in columns)]
    lines = [
        [name, str(row["pictures"]), *(cell(row["metrics"].get(column)) for column in columns)]
        for name, row in rows.items()
    ]
    return markdown(header, lines)


def difference_table(results: Results, names: Sequence[str] = ("identity", "held_out", "separation", "leakage")) -> str:
    """What a row has beyond another: paired difference, interval, and whether the two rows' own intervals overlap."""
    found = [entry for entry in results["comparisons"] if entry["metric"] in names]
    if not found:
        return ""
    lines = [
        [
            entry["row"],
            entry["minus"],
            metric(entry["metric"]).label,
            cell(entry, signed=True),
            {True: "yes", False: "no", None: "-"}[None if entry["low"] is None else entry["excludes_zero"]],
            {True: "yes", False: "no", None: "-"}[entry["intervals_overlap"]],
        ]
        for entry in found
    ]
    header = ["row", "minus", "metric", "paired difference", "interval excludes 0", "the rows' intervals overlap"]
    return markdown(header, lines)


def cell(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """`0.512 [0.480, 0.541]`, or `-` for what was not measured."""
    if estimate is None:
        return "-"
    kind = "+.3f" if signed else ".3f"
    text = format(estimate["mean"], kind)
    if estimate["low"] is None:
        return text
    return f"{text} [{format(estimate['low'], kind)}, {format(estimate['high'], kind)}]"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows)


def _people(results: Results, name: str) -> int:
    return int(results["protocol"]["rows"][name]["people"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog="python -m training.evaluate.table", description=__doc__)
    parser.add_argument("results", help="results.json of python -m training.evaluate")
    try:
        sys.stdout.write(results_table(read_results(parser.parse_args(arguments).results)))
    except ValueError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
