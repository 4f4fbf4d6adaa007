"""The floors by calculation: against the pack's own site tables and the counts of TRAINING 5.1."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from attention.grid import grid_at_level
from attention.merge import SMALL, num_left
from attention.sites import SD15_SITES, SDXL_SITES
from benchmarks import floor
from benchmarks.bars import BARS
from benchmarks.results import verdict

TABLES = {"sd15": SD15_SITES, "sdxl": SDXL_SITES}


@pytest.mark.parametrize("family", TABLES)
def test_the_layers_are_those_of_the_pack(family):
    layout = floor.LAYOUTS[family]
    wanted: dict[tuple[int, int, int], int] = {}
    for site in TABLES[family]:
        rows, _ = grid_at_level((layout.native // 8,) * 2, site.level)
        key = (rows, site.channels, site.heads)
        wanted[key] = wanted.get(key, 0) + 1
    assert {row[:3]: row[3] for row in layout.sites} == wanted
    assert {site.context for site in TABLES[family]} == {layout.context}


@pytest.mark.parametrize(
    ("family", "reference", "gflop"),
    [("sd15", 512, 122.5), ("sd15", 256, 30.6), ("sdxl", 1024, 751.6), ("sdxl", 512, 187.9)],
)
def test_a_reference_adds_what_was_counted(family, reference, gflop):
    assert floor.added(floor.LAYOUTS[family], reference) == pytest.approx(gflop, rel=1e-3)


def test_the_forward_pass_is_what_the_trainer_counts(sd15_cost):
    layout = floor.LAYOUTS["sd15"]
    assert layout.forward == pytest.approx(sd15_cost.forward, rel=1e-3)
    assert floor.added(layout, 512) == pytest.approx(sd15_cost.fused, rel=5e-3)
    assert floor.cache_mib(layout, 512) == sd15_cost.cache_mib


def test_merging_counts_tokens_as_the_pack_does():
    layout = floor.LAYOUTS["sd15"]
    assert floor.SMALL == SMALL
    for share in (0.25, 0.5, 0.8):
        total = 0.0
        for side, channels, heads, count in layout.sites:
            left = num_left(side * side, share)
            wide = channels + 8 * heads if left < side * side else channels
            total += count * 4 * side * side * ((77 + left) * wide - 77 * channels)
        assert floor.added(layout, 512, share=share) == pytest.approx(total / 1e9, rel=1e-3)


def test_every_gpu_bar_of_the_issue_has_a_floor_that_meets_it():
    bars = [bar for (_, device), found in BARS.items() if device == "cuda" for bar in vars(found).values() if bar]
    floors = floor.gpu_floors()
    assert sorted(bars) == sorted(one.bar for one in floors[:5])
    assert {one.bar for one in floors[5:]} == {1.0, 1.05, 1.5}
    assert all(verdict(one.value, one.bar, 0.0, at_least=one.at_least) == "met" for one in floors)


def test_the_table_says_that_nothing_was_measured():
    table = floor.gpu_table("not measured: no CUDA here")
    assert len(table) == 2 + len(floor.gpu_floors()) + 1
    assert sum("not measured: no CUDA here |" in line for line in table) == len(floor.gpu_floors())
    assert "44.06 MiB" in table[-1] and "met" in table[-1] and "NOT" not in table[-1]
    assert len({line.count("|") for line in [*table]}) == 1


def test_the_page_shows_the_floors_that_the_command_prints():
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    for line in floor.reference_table():
        assert line in page
    for one in floor.gpu_floors():
        assert f"| {one.value:.3f} {one.unit} |" in page and one.name in page
    assert math.isclose(floor.cache_mib(floor.LAYOUTS["sdxl"], 1024), 400.0)
