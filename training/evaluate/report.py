"""`report.md`: what was compared, the tables, plots and pictures, and what made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .grid import write_grids
from .metrics import metric
from .plan import Job
from .plots import write_plots
from .scoring import Record
from .table import difference_table, markdown, row_table


def write_report(
    out: Path, results: Mapping[str, Any], records: Sequence[Record], jobs: Mapping[str, Sequence[Job]]
) -> None:
    """Writes `report.md` and the pictures it shows, into `out`."""
    grids = [f"grids/{name}" for name in write_grids(out / "grids", jobs)]
    plots = [f"plots/{name}" for name in write_plots(out / "plots", results, records)]
    (out / "report.md").write_text(report(results, plots, grids), encoding="utf-8")


def report(results: Mapping[str, Any], plots: Sequence[str], grids: Sequence[str]) -> str:
    """The report as Markdown."""
    single, several = (row_table(results, several=kind) for kind in (False, True))
    sections = [
        f"# Evaluation: {results['name']}\n\n{_people(results)}\n\n{_how_to_read(results)}",
        f"## One person per picture\n\n{single}" if single else "",
        f"## Several people per picture\n\n{several}" if several else "",
        _section("What a row adds", difference_table(results)),
        _section("Time", _timing(results["timing"])),
        _section("Plots", "\n\n".join(f"![{Path(name).stem}]({name})" for name in plots)),
        _section("Pictures", "\n\n".join(f"![{Path(name).stem}]({name})" for name in grids)),
        _section("Not measured", "\n".join(f"* {what}: {why}" for what, why in results["not_measured"].items())),
        f"## Made with\n\n{_made_with(results)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _people(results: Mapping[str, Any]) -> str:
    people = results["people"]
    draw = results["protocol"]["draw"]
    most = max(row["references"] for row in results["protocol"]["rows"].values())
    lacking = sum(photos < most for photos in people["photos"])
    lines = [
        f"{people['count']} people, {people['held_out']} with a photo that no picture was made from; {draw['steps']} "
        f"steps, guidance scale {draw['guidance_scale']:g}, {draw['seeds']} seeds, {len(draw['prompts'])} prompts."
    ]
    if lacking:
        lines.append(
            f"**{lacking} people have fewer than {most} photos: their further references are changed crops (flip, cut, "
            "colour) of the same photos**, so that several references say little more than one."
        )
    if people["left_out"]:
        names = "; ".join(f"{name} ({reason})" for name, reason in people["left_out"])
        lines.append(f"Left out: {names}.")
    return "\n\n".join(lines)


def _how_to_read(results: Mapping[str, Any]) -> str:
    present = [name for row in results["rows"].values() for name in row["metrics"]]
    meanings = [f"* **{metric(name).label}**: {metric(name).meaning}" for name in dict.fromkeys(present)]
    scale = results["people"]["scale"]
    known = [f"{label} {value:.2f}" for label, value in scale.items() if value is not None]
    head = "In brackets: 95 % interval over people (bootstrap)."
    if known:
        head += f" With this face pack, among these people: {', '.join(known)}."
    return "\n".join([head, "", *meanings])


def _timing(timing: Mapping[str, Any] | None) -> str:
    if timing is None:
        return ""

    def bounds(name: str) -> str:
        low_high = timing[f"{name}_bounds"]
        return "" if low_high is None else f" [{low_high[0]:.3f}, {low_high[1]:.3f}]"

    where = timing["machine"]["gpu"] or f"{timing['machine']['processor']} CPU"
    line = f"seconds = {timing['a']:.3f}{bounds('a')} + {timing['b']:.3f}{bounds('b')} N"
    return f"{line} for N references, row *{timing['row']}*, {timing['count']} pictures, on {where}."


def _made_with(results: Mapping[str, Any]) -> str:
    models = results["models"]
    pack = models["face_pack"]
    rows = [["base", name, digest] for name, digest in models["base"].items()]
    rows += [[f"row {name}", facts["name"], facts.get("sha256", "-")] for name, facts in models["adapters"].items()]
    rows += [["scorer, detector", pack["name"], pack["detector_sha256"]]]
    rows += [["scorer, recogniser", f"{pack['name']}, {pack['dim']} numbers", pack["recogniser_sha256"]]]
    if models["clip"]:
        rows += [["CLIP", f"{models['clip']['name']} {file}", sha] for file, sha in models["clip"]["files"].items()]
    if models["deepface"]:
        rows += [["deepface", f"version {models['deepface']}", "-"]]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    code = results["code_revision"][:12] or "no checkout"
    origin = f"Protocol `{results['protocol_hash'][:16]}`, code `{code}`. {versions}."
    return "\n\n".join([markdown(["what", "name", "sha256"], rows), origin, f"```\n{results['command']}\n```"])
