"""The README tells the truth: its nodes exist, its files are there, its licences are those the code knows."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

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


def test_pictures_are_there_before_the_first_heading_and_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README.split("\n## ")[0])
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 200_000
        assert Image.open(ROOT / picture).width > 1000


def section(title: str) -> str:
    """The text under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_template_is_in_the_table_and_no_other():
    named = set(re.findall(r"\*([a-z_]+)\*", section("Templates")))
    assert named == {path.stem for path in (ROOT / "example_workflows").glob("*.json")}


def test_every_blueprint_is_named():
    for path in (ROOT / "subgraphs").glob("*.json"):
        assert f"*{path.stem}*" in README


def test_messages_of_the_troubleshooting_are_in_the_code():
    """String pieces of neighbouring lines are joined as Python does."""
    code = ""
    for folder in ("attention", "faces", "nodes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            code += re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
    messages = re.findall(r'^\| "([^"]+)" \|', section("When something goes wrong"), flags=re.MULTILINE)
    assert len(messages) >= 8
    assert [message for message in messages if message not in code] == []


def test_training_commands_are_those_of_the_training_page():
    commands = re.findall(r"^python -m training\..*$", section("Training"), flags=re.MULTILINE)
    assert len(commands) == 3
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert [command for command in commands if command not in page] == []


def test_licences_are_those_the_nodes_show():
    assert RESEARCH in README
    assert {pack.name.split("_")[0] for pack in KNOWN_PACKS if pack.license == RESEARCH} == {"buffalo", "antelopev2"}
    assert "MIT" in OPENCV_LICENSE and "Apache-2.0" in OPENCV_LICENSE
    assert "MIT, Apache-2.0" in README
