"""The report's plots, as PNG: bars with intervals, likeness over strength, histogram of cosines, time per reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import metric
from .scoring import Record

BARS = ("identity", "held_out", "separation", "leakage")
MOST_LINES = 6
"""Rows in one histogram; more cannot be told apart."""


def write_plots(folder: Path, results: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    """Writes what there is data for; returns the file names. Raises ValueError without matplotlib."""
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [f"bars_{name}.png" for name in BARS if _bars(plt, folder / f"bars_{name}.png", results, name)]
    drawn += ["strength.png"] * _strengths(plt, folder / "strength.png", results)
    drawn += ["cosines.png"] * _histogram(plt, folder / "cosines.png", results, records)
    drawn += ["timing.png"] * _timing(plt, folder / "timing.png", results["timing"])
    return drawn


def strength_lines(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[float, Mapping[str, Any]]]]]:
    """Rows that differ in nothing but strength: (first row's name, [(strength, its identity), ...]), baseline at 0."""
    families: dict[str, list[tuple[float, str]]] = defaultdict(list)
    settings = results["protocol"]["rows"]
    for name, row in settings.items():
        shows = row["adapter"] not in ("none", "vae") and row["pictures"] is None
        if shows and not row["wrong_person"] and "identity" in results["rows"][name]["metrics"]:
            families[repr(sorted((k, repr(v)) for k, v in row.items() if k != "strength"))].append(
                (row["strength"], name)
            )
    minus = {entry["row"]: entry["minus"] for entry in results["comparisons"] if entry["metric"] == "identity"}
    lines = []
    for members in families.values():
        if len({strength for strength, _ in members}) < 2:
            continue
        baseline = minus.get(members[0][1])
        known = [*([(0.0, baseline)] if baseline and settings[baseline]["adapter"] == "none" else []), *members]
        points = [(s, results["rows"][n]["metrics"]["identity"]) for s, n in sorted(known)]
        lines.append((members[0][1], points))
    return lines


def _bars(plt: Any, path: Path, results: Mapping[str, Any], name: str) -> bool:
    rows = {row: found["metrics"][name] for row, found in results["rows"].items() if name in found["metrics"]}
    if not rows:
        return False
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.32 * len(rows)))
    places = np.arange(len(rows))[::-1]
    means = [found["mean"] for found in rows.values()]
    axes.barh(places, means, color="#5b8db8", height=0.7)
    for place, found in zip(places, rows.values()):
        if found["low"] is not None:
            axes.plot([found["low"], found["high"]], [place, place], color="black", linewidth=1.5)
    axes.set_yticks(places, list(rows))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"{metric(name).label} (line: 95 % interval over people)")
    _save(plt, figure, path)
    return True


def _strengths(plt: Any, path: Path, results: Mapping[str, Any]) -> bool:
    lines = strength_lines(results)
    if not lines:
        return False
    figure, axes = plt.subplots(figsize=(5, 3.5))
    for name, points in lines:
        x = [strength for strength, _ in points]
        axes.plot(x, [found["mean"] for _, found in points], marker="o", label=f"as {name}")
        bounded = [(s, found) for s, found in points if found["low"] is not None]
        low, high = ([found[side] for _, found in bounded] for side in ("low", "high"))
        axes.fill_between([s for s, _ in bounded], low, high, alpha=0.2)
    axes.set_xlabel("strength (0: without identity)")
    axes.set_ylabel("identity")
    axes.legend()
    _save(plt, figure, path)
    return True


def _histogram(plt: Any, path: Path, results: Mapping[str, Any], records: Sequence[Record]) -> bool:
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["identity_found"] is not None and results["protocol"]["rows"][record["row"]]["people"] == 1:
            values[record["row"]].append(record["identity_found"])
    if not values:
        return False
    figure, axes = plt.subplots(figsize=(6, 3.5))
    edges = np.linspace(-0.4, 1.0, 29)
    for name, some in list(values.items())[:MOST_LINES]:
        axes.hist(some, bins=edges, histtype="step", linewidth=1.5, label=name, density=True)
    for label, value in results["people"]["scale"].items():
        if value is not None:
            axes.axvline(value, linestyle=":", color="grey")
            axes.text(value, 0.98, label, rotation=90, va="top", ha="right", transform=axes.get_xaxis_transform())
    axes.set_xlabel("cosine to the first reference, found faces")
    axes.legend(fontsize="small")
    _save(plt, figure, path)
    return True


def _timing(plt: Any, path: Path, timing: Mapping[str, Any] | None) -> bool:
    if timing is None:
        return False
    figure, axes = plt.subplots(figsize=(5, 3))
    numbers = sorted(int(n) for n in timing["seconds"])
    for n in numbers:
        some = timing["seconds"][str(n)]
        axes.plot([n] * len(some), some, "o", color="#5b8db8")
    axes.plot(numbers, [timing["a"] + timing["b"] * n for n in numbers], color="black")
    axes.set_xlabel("references N")
    axes.set_ylabel("seconds per picture")
    axes.set_ylim(bottom=0)
    _save(plt, figure, path)
    return True


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the report's plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
