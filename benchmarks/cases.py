"""The rows of the table: what is patched, and the bar where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .bars import BARS, Bars
from .quality import FORMS
from .scene import Scene

TRAINING_FREE = "training-free"


@dataclass(frozen=True)
class Case:
    """One row. bar: the largest ratio to the unpatched step; against: the row the bar is relative to, if not that."""

    group: str
    name: str
    patch: Callable[[Scene], Any]
    bar: float | None = None
    against: str = ""


def cases(scene: Scene, device: str) -> list[Case]:
    """All rows for one model. "Full" is a reference as large as the picture."""
    bars, size = BARS.get((scene.layout.split("_")[0], device), Bars()), scene.size

    def one(**inputs: Any) -> Callable[[Scene], Any]:
        return lambda s: s.patch(**{"identity": s.person(), "reference_size": size, **inputs})[0]

    def many(count: int) -> Callable[[Scene], Any]:
        return lambda s: s.patch(identity=s.person(count), reference_size=size)[0]

    def routed(count: int, **how: Any) -> Callable[[Scene], Any]:
        return lambda s: s.patch(routed=s.people(count, **how), reference_size=size)[0]

    free = one(adapter=TRAINING_FREE, timestep="clean")
    people = [
        Case("people", f"{n} routed people side by side", routed(n), bars.person, f"{n - 1} routed people side by side")
        for n in (2, 3, 4)
    ]
    return [
        Case("size", f"1 reference of {size} px", one(), bars.full),
        Case("references", f"2 references of {size} px", many(2)),
        Case("references", f"4 references of {size} px", many(4)),
        Case("references", f"8 references of {size} px", many(8)),
        Case("size", f"1 reference of {size // 2} px", one(reference_size=size // 2), bars.half),
        Case("size", f"1 reference of {size // 4} px", one(reference_size=size // 4)),
        Case("people", "1 routed people side by side", routed(1)),
        *people,
        Case("people", "4 routed people, half of it background that sees all", routed(4, covered=0.5)),
        Case("people", "4 routed people, half of it background without faces", _no_background(size)),
        Case("mode", "decoupled", one(combine="decoupled")),
        Case("mode", "strength 1.5 (term channels)", one(strength=1.5)),
        Case("mode", "matched: noised anew at every step", one(timestep="matched")),
        Case("mode", "training-free, clean", free),
        Case("mode", "training-free, matched", one(adapter=TRAINING_FREE, timestep="matched")),
        *(Case("form", f"1 reference of {size} px, {name}", one(**form)) for name, form in FORMS.items()),
        Case("strength 0", "strength 0", one(strength=0.0), 1.0),
    ]


def _no_background(size: int) -> Callable[[Scene], Any]:
    return lambda s: s.patch(routed=s.people(4, covered=0.5, background="none"), reference_size=size)[0]
