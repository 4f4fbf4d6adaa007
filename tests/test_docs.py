"""What the documentation names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FOLDERS = (
    "attention",
    "faces",
    "nodes",
    "training",
    "tests",
    "web",
    "locales",
    "example_workflows",
    "subgraphs",
    "docs",
)
CODE = {path.name for folder in FOLDERS[:5] for path in (ROOT / folder).rglob("*.py")} | {"dev.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_files_exist(page):
    """Bare names of Python files, and paths that begin with one of our folders; patterns and outputs are left out."""
    named = set(re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")))
    paths = {name for name in named if "/" in name and name.split("/")[0] in FOLDERS}
    outputs = {name for name in paths if name.startswith("tests/browser/screenshots")}  # made by the tests
    assert sorted(name for name in paths - outputs if not (ROOT / name).exists()) == []
    assert sorted(name for name in named if re.fullmatch(r"\w+\.py", name) and name not in CODE) == []


def test_commands_of_the_contributing_page_exist():
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    known = set(re.findall(r'add_parser\("(\w+)"', (ROOT / "dev.py").read_text(encoding="utf-8")))
    commands = re.findall(r"python dev\.py (\w+)", page)
    assert len(commands) >= 7
    assert set(commands) <= known
