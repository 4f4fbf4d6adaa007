"""The README tells the truth: its nodes exist, its files are there, its licences are those the code knows."""

from __future__ import annotations

import re
from pathlib import Path

from faces.opencv_backend import LICENSE as OPENCV_LICENSE
from faces.packs import KNOWN_PACKS, RESEARCH

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_node_is_in_the_table_and_no_other(pack):
    cells = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(pack.nodes)


def test_named_files_and_folders_exist():
    named = re.findall(r"`((?:docs|tests|training|example_workflows)/[\w./]+|[\w-]+\.(?:py|txt|toml)|LICENSE)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_templates_of_the_quick_start_exist():
    for name in ("one_person", "three_people"):
        assert name in README
        assert (ROOT / "example_workflows" / f"{name}.json").is_file()


def test_licences_are_those_the_nodes_show():
    assert RESEARCH in README
    assert {pack.name.split("_")[0] for pack in KNOWN_PACKS if pack.license == RESEARCH} == {"buffalo", "antelopev2"}
    assert "MIT" in OPENCV_LICENSE and "Apache-2.0" in OPENCV_LICENSE
    assert "MIT, Apache-2.0" in README
