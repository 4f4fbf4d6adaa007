"""Promise 8: the matrix of other people's nodes beside ours. Every cell's right value is derived, none is remembered.

`FUSEDID_PEER_FORMS=all` tries every form in every row, not only where it is a kind of its own;
`FUSEDID_PEER_TABLE=<file>` writes the table as Markdown (docs/peers.md holds one).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peer_checks
import peer_packs
import pytest
from peer_matrix import STAND_IN, Cell, Kit, Row
from peer_rows_host import host_rows, with_values
from peer_rows_packs import pack_rows
from peer_rows_standins import standin_rows

ROWS = [*with_values(host_rows()), *standin_rows(), *pack_rows()]
EVERYTHING = os.environ.get("FUSEDID_PEER_FORMS") == "all"


def chosen_forms(number: int, row: Row) -> list[str]:
    """Every form where a row is a kind of its own; else the paper's and one of the others in turn."""
    others = [form for form in row.forms if form != "fused"]
    if EVERYTHING or row.thorough or not others:
        return list(row.forms)
    return [form for form in row.forms if form in ("fused", others[number % len(others)])]


CASES = [
    pytest.param(row, form, id=f"{row.id}-{form}")
    for number, row in enumerate(ROWS)
    for form in chosen_forms(number, row)
]


@pytest.fixture(scope="module")
def kits(pack: Any, small_models: Any) -> Any:
    """A kit per layout."""
    asyncio.run(pack.host.nodes.init_builtin_extra_nodes())
    made: dict[str, Kit] = {}

    def kit(layout: str) -> Kit:
        if layout not in made:
            made[layout] = Kit(pack, small_models, layout)
        return made[layout]

    return kit


@pytest.fixture(scope="module")
def table() -> Iterator[list[Cell]]:
    """Cells of this run, written at its end where FUSEDID_PEER_TABLE says."""
    cells: list[Cell] = []
    yield cells
    if path := os.environ.get("FUSEDID_PEER_TABLE"):
        Path(path).write_text(peer_checks.markdown(cells), encoding="utf-8")


@pytest.mark.parametrize(("row", "form"), CASES)
def test_both_are_whole_in_every_order(kits: Any, table: list[Cell], row: Row, form: str) -> None:
    kit = kits(row.layout)
    if row.pack not in ("", STAND_IN):
        peer_packs.load_peer(kit.host, row.pack)
    for node in row.nodes:
        if node not in kit.host.nodes.NODE_CLASS_MAPPINGS:
            pytest.skip(f"ComfyUI {kit.host.version} has no {node}")
    cells = peer_checks.Trial(kit, row, form).cells()
    table.extend(cells)
    assert not [f"{cell.order}: {cell.verdict}" for cell in cells if not cell.verdict.startswith("ok")]
