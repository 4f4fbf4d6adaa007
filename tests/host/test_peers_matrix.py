"""Promise 8: the matrix of other people's nodes beside ours. Every cell's right value is derived, none is remembered.

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
from peer_matrix import Cell, Kit, Row
from peer_rows_host import host_rows, with_hook_values
from peer_rows_packs import pack_rows

ROWS = [*with_hook_values(host_rows()), *pack_rows()]
CASES = [pytest.param(row, form, id=f"{row.id}-{form}") for row in ROWS for form in row.forms]


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
    if row.pack:
        peer_packs.load_peer(kit.host, row.pack)
    for node in row.nodes:
        if node not in kit.host.nodes.NODE_CLASS_MAPPINGS:
            pytest.skip(f"ComfyUI {kit.host.version} has no {node}")
    cells = peer_checks.Trial(kit, row, form).cells()
    table.extend(cells)
    assert not [f"{cell.order}: {cell.verdict}" for cell in cells if not cell.verdict.startswith("ok")]
