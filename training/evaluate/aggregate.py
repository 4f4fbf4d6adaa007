"""Records to rows: means with intervals over people, and what one row has beyond another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .bootstrap import Estimate, estimate, paired_difference
from .config import BootstrapConfig, Protocol, RowConfig
from .metrics import DEEPFACE, METRICS
from .scoring import Record

COMPARED = ("identity", "identity_multi", "held_out", "found", "separation", "leakage", "clip", "ssim")


def by_row(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Row -> its records, in order."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record["row"]].append(record)
    return dict(found)


def unit_means(records: Sequence[Record], metric: str) -> dict[int, float]:
    """Unit (one person, or the people of one picture) -> mean over its records; without those that have no value."""
    values: dict[int, list[float]] = defaultdict(list)
    for record in records:
        if record.get(metric) is not None:
            values[record["unit"]].append(float(record[metric]))
    return {unit: sum(some) / len(some) for unit, some in values.items()}


def metric_names(records: Sequence[Record]) -> list[str]:
    """Metrics that occur, in the order of the reports; deepface's last."""
    present = {name for record in records for name, value in record.items() if value is not None}
    networks = sorted(name for name in present if name.startswith(DEEPFACE))
    return [one.name for one in METRICS if one.name in present] + networks


def row_results(records: Sequence[Record], options: BootstrapConfig) -> dict[str, Any]:
    """One row for JSON: numbers of pictures, people and units, and every metric's mean with its interval."""
    estimates = {name: _estimate(records, name, options) for name in metric_names(records)}
    return {
        "pictures": len({record["picture"] for record in records}),
        "people": len({record["person"] for record in records}),
        "units": len({record["unit"] for record in records}),
        "metrics": {name: found.as_dict() for name, found in estimates.items() if found is not None},
    }


def baseline_of(protocol: Protocol, name: str) -> str | None:
    """The row that a row is compared with; None when there is none that fits."""
    row = protocol.rows[name]
    for other, candidate in protocol.rows.items():
        chosen = other == protocol.baseline if protocol.baseline else _is_without(candidate)
        if other != name and chosen and _comparable(protocol, row, candidate):
            return other
    return None


def comparisons(protocol: Protocol, rows: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Every row minus its baseline, then the protocol's own pairs: paired difference, interval, overlap; for JSON."""
    pairs = [(name, other) for name in rows if (other := baseline_of(protocol, name)) is not None and other in rows]
    pairs += [pair for pair in protocol.comparisons if pair not in pairs and pair[0] in rows and pair[1] in rows]
    found = [
        _compared(protocol, rows, ours, theirs, name)
        for ours, theirs in pairs
        for name in [*COMPARED, *(n for n in metric_names(rows[ours]) if n.startswith(DEEPFACE))]
    ]
    return [entry for entry in found if entry is not None]


def _compared(
    protocol: Protocol, rows: Mapping[str, Sequence[Record]], ours: str, theirs: str, metric: str
) -> dict[str, Any] | None:
    options = protocol.bootstrap
    difference = paired_difference(
        unit_means(rows[ours], metric), unit_means(rows[theirs], metric), resamples=options.resamples, seed=options.seed
    )
    one, other = (_estimate(rows[name], metric, options) for name in (ours, theirs))
    if difference is None or one is None or other is None:
        return None
    return {
        "row": ours,
        "minus": theirs,
        "metric": metric,
        **difference.as_dict(),
        "excludes_zero": difference.excludes_zero,
        "intervals_overlap": one.overlaps(other),
    }


def _estimate(records: Sequence[Record], metric: str, options: BootstrapConfig) -> Estimate | None:
    return estimate(list(unit_means(records, metric).values()), resamples=options.resamples, seed=options.seed)


def _is_without(row: RowConfig) -> bool:
    return row.pictures is None and row.adapter == "none"


def _comparable(protocol: Protocol, row: RowConfig, other: RowConfig) -> bool:
    """As many people per picture; drawn at one size, unless the pictures come from elsewhere."""
    draw = protocol.draw
    sizes = [(one.width or draw.width, one.height or draw.height) for one in (row, other)]
    return row.people == other.people and (sizes[0] == sizes[1] or row.pictures is not None)
