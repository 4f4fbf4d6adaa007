"""The floor of every GPU bar by calculation: `python -m benchmarks.floor`. Needs no GPU, no weights and no ComfyUI.

One reference adds the attention of the positive row to its keys and nothing else; with guidance a step has two rows.
Operations are 2 per multiply-add. `python -m training.cost` counts the same on the real layers, and a test compares.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .bars import BARS, CACHE_MIB, CACHE_TOLERANCE, DENSE_BAR, PEER_BAR

TEXT = 77
FACEID_TOKENS = 4
MORE_CHANNELS = 8  # of a head, where keys carry different score terms
SMALL = 256  # grids that token merging leaves whole
GIGA, MIB = 1e9, 2**20


@dataclass(frozen=True)
class Layout:
    """Sites as (tokens a side at the native size, channels, heads, how many); GFLOP of a forward pass per row there."""

    name: str
    native: int
    forward: float
    context: int
    sites: tuple[tuple[int, int, int, int], ...]


LAYOUTS = {
    "sd15": Layout("SD1.5", 512, 803.3, 768, ((64, 320, 8, 5), (32, 640, 8, 5), (16, 1280, 8, 5), (8, 1280, 8, 1))),
    "sdxl": Layout("SDXL", 1024, 6761.0, 2048, ((64, 640, 10, 10), (32, 1280, 20, 60))),
}


@dataclass(frozen=True)
class Floor:
    """One bar. value: what calculation gives. at_least: whether the bar is a smallest value."""

    name: str
    bar: float
    value: float
    unit: str = "x"
    at_least: bool = False


def added(layout: Layout, reference: int, *, share: float = 1.0, term: bool = False) -> float:
    """GFLOP that one reference of so many pixels a side adds to a step. share: of its tokens, after merging.

    term: with score terms (several references, a strength, merged tokens), which widen the heads of the row.
    """
    total = 0.0
    for side, channels, heads, count in layout.sites:
        queries, tokens = side * side, (side * reference // layout.native) ** 2
        left = max(SMALL, round(tokens * share)) if tokens > SMALL else tokens
        wide = channels + MORE_CHANNELS * heads if term or left < tokens else channels
        total += count * 4 * queries * ((TEXT + left) * wide - TEXT * channels)
    return total / GIGA


def ratio(layout: Layout, reference: int, **how: object) -> float:
    """A step with one reference over the unpatched step."""
    return 1 + added(layout, reference, **how) / (2 * layout.forward)  # type: ignore[arg-type]


def cache_mib(layout: Layout, reference: int, *, bytes_per_number: int = 2) -> float:
    """Keys and values of one reference."""
    tokens = [((side * reference // layout.native) ** 2, channels, count) for side, channels, _, count in layout.sites]
    return sum(2 * bytes_per_number * count * n * channels for n, channels, count in tokens) / MIB


def faceid(layout: Layout) -> float:
    """A step of IPAdapter FaceID over the unpatched step: a second attention of both rows to four tokens."""
    total = 0.0
    for side, channels, _, count in layout.sites:
        attention, projections = 4 * side * side * channels, 4 * layout.context * channels  # of one token
        total += 2 * count * FACEID_TOKENS * (attention + projections)
    return 1 + total / GIGA / (2 * layout.forward)


def dense_mask_gain(layout: Layout, reference: int, people: int = 4) -> float:
    """Pairs of queries and keys with a dense mask, over those that see each other, at the finest level."""
    tokens = (layout.sites[0][0] * reference // layout.native) ** 2
    return (TEXT + people * tokens) / (TEXT + tokens)


def gpu_floors() -> list[Floor]:
    """Every bar that needs a GPU."""
    sd15, sdxl = LAYOUTS["sd15"], LAYOUTS["sdxl"]
    small, large = BARS["sd15", "cuda"], BARS["sdxl", "cuda"]
    assert small.full and small.half and small.person and large.half and large.person
    return [
        Floor("SD1.5 512 px, 1 reference of 512 px", small.full, ratio(sd15, 512)),
        Floor("SD1.5 512 px, 1 reference of 256 px", small.half, ratio(sd15, 256)),
        Floor("SD1.5 512 px, each further routed person", small.person, 1.0),
        Floor("SDXL 1024 px, 1 reference of 512 px", large.half, ratio(sdxl, 512)),
        Floor("SDXL 1024 px, each further routed person", large.person, 1.0),
        Floor("strength 0", 1.0, 1.0),
        Floor("1 reference of 256 px, against IPAdapter FaceID", PEER_BAR, ratio(sd15, 256) / faceid(sd15)),
        Floor("4 routed people against a dense mask, 64x64", DENSE_BAR, dense_mask_gain(sd15, 512), at_least=True),
    ]


def gpu_table(reason: str) -> list[str]:
    """The bars with their floors. reason: why they were not measured."""
    lines = ["| on a GPU | bar | floor by calculation | measured |", "|---|---|---|---|"]
    for one in gpu_floors():
        sign = ">=" if one.at_least else "<="
        lines.append(f"| {one.name} | {sign} {one.bar:.2f} {one.unit} | {one.value:.3f} {one.unit} | {reason} |")
    mib = cache_mib(LAYOUTS["sd15"], 512)
    held = abs(mib - CACHE_MIB) <= CACHE_TOLERANCE * CACHE_MIB
    verdict = f"{mib:.2f} MiB from the shapes: {'met' if held else 'NOT met'}"
    lines.append(f"| K/V of a 512 px reference, SD1.5, fp16 | {CACHE_MIB} MiB ± 2 % | {mib:.2f} MiB | {verdict} |")
    return lines


def reference_table() -> list[str]:
    """What one reference adds, by its size."""
    lines = [
        "| model | unpatched step | reference | added | floor | floor with a term | half of the tokens merged |",
        "|---|---|---|---|---|---|---|",
    ]
    for layout in LAYOUTS.values():
        name, step = f"{layout.name}, {layout.native} px", f"{2 * layout.forward:.0f} GFLOP"
        for reference in (layout.native, layout.native // 2, layout.native // 4):
            ratios = [ratio(layout, reference, **how) for how in ({}, {"term": True}, {"share": 0.5})]
            cells = [name, step, f"{reference} px", f"{added(layout, reference):.1f} GFLOP"]
            lines.append(f"| {' | '.join([*cells, *(f'{one:.3f} x' for one in ratios)])} |")
            name = step = ""
    return lines


def main() -> int:
    """Prints both tables."""
    sys.stdout.write("\n".join([*reference_table(), "", *gpu_table("not measured"), ""]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
