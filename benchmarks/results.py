"""The measured rows as a Markdown table, a JSON file and an SVG plot."""

from __future__ import annotations

import html
import json
import statistics
from pathlib import Path
from typing import Any

from .measure import spread

Row = dict[str, Any]


def verdict(value: float, bar: float | None, noise: float, *, at_least: bool = False) -> str:
    """Whether a value meets its bar: `within noise` when only the spread of the rounds says so."""
    if bar is None:
        return ""
    miss = bar - value if at_least else value - bar
    return "met" if miss <= 0 else "within noise" if miss <= noise else "NOT met"


def table(result: dict[str, Any]) -> str:
    """All models of a result, for people."""
    lines = [f"Machine: {result['machine']['device']}; torch {result['machine']['torch']}; {result['host']}.", ""]
    lines += [f"Command: `{result['machine']['command']}`", ""]
    for model in result["models"]:
        lines += _model_table(model)
    return "\n".join(lines)


def _model_table(model: dict[str, Any]) -> list[str]:
    lines = [
        f"### {model['layout']}, {model['size']} px, {model['dtype']}, kernel {model['kernel']}: "
        f"{model['unpatched_s']:.3f} s per unpatched step, {model['rounds']} rounds",
        "",
        "| case | step / unpatched | ± | FLOPs / unpatched | bar | | K/V MiB | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in model["rows"]:
        bar = "" if row["bar"] is None else f"<= {row['bar']:.2f} x"
        bar += f" {row['against']}: {row['ratio_against']:.3f}" if row.get("against") and bar else ""
        held = "" if row["features_mib"] is None else f"{row['features_mib']:.1f}"
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        flops = "" if row["flops"] is None else f"{row['flops']:.3f}"
        cells = (row["name"], f"{row['ratio']:.3f}", f"{row['noise']:.3f}", flops, bar, row["verdict"], held, peak)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"* {note}" for note in model["notes"]), ""]
    lines += [*model["quality_lines"], ""] if model["quality_lines"] else []
    return lines


def row_of(case: Any, ratios: list[float], **more: Any) -> Row:
    """One line of the table from the ratios of all rounds."""
    row = {"group": case.group, "name": case.name, "bar": case.bar, "against": case.against, "ratios": ratios}
    return {**row, "ratio": statistics.median(ratios), "noise": spread(ratios), **more}


def write(result: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """The JSON file and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    data, plot = folder / f"{name}.json", folder / f"{name}.svg"
    data.write_text(json.dumps(result, indent=2), encoding="utf-8")
    plot.write_text(_svg(result), encoding="utf-8")
    return [data, plot]


def _svg(result: dict[str, Any]) -> str:
    """Horizontal bars of step / unpatched, a tick where the bar of the issue stands."""
    rows = [(model, row) for model in result["models"] for row in model["rows"]]
    left, unit, height = 420, 260, 22
    widest = max([2.0, *(row["ratio"] for _, row in rows)])
    width = left + int(unit * (widest - 0.8)) + 80
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height * (len(rows) + 2)}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="16">{html.escape(result["machine"]["device"])}: step / unpatched step</text>',
    ]

    def x(ratio: float) -> float:
        return left + unit * (max(ratio, 0.8) - 0.8)

    for number, (model, row) in enumerate(rows, start=1):
        y = height * number + 6
        label = html.escape(f"{model['layout']} {model['size']}: {row['name']}")
        parts.append(f'<text x="8" y="{y + 14}">{label}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{x(row["ratio"]) - left:.0f}" height="14" fill="#4a7"/>')
        if row["bar"] is not None and not row["against"]:
            parts.append(f'<rect x="{x(row["bar"]):.0f}" y="{y}" width="2" height="20" fill="#c33"/>')
        parts.append(f'<text x="{x(row["ratio"]) + 6:.0f}" y="{y + 14}">{row["ratio"]:.3f}</text>')
    start, end = x(1.0), height * (len(rows) + 1)
    parts.append(f'<line x1="{start}" y1="{height}" x2="{start}" y2="{end}" stroke="black"/></svg>')
    return "\n".join(parts)
