"""Every node has a help page that tells what its schema tells, with a picture that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from help_lists import with_lists
from locale_words import own_schemas
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "web" / "docs"
NAMES = sorted(path.stem for path in PAGES.glob("*.md"))
SECTIONS = ("## Inputs", "## Outputs", "## Recipe", "## Common mistakes")


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def test_every_node_has_a_page_and_no_page_is_left_over(server):
    assert set(NAMES) == set(own_schemas(server.object_info()))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_outputs_are_those_of_the_node(name, server):
    schema = server.object_info(name)
    assert page(name) == with_lists(page(name), schema), "run: python dev.py pages --comfyui PATH"
    assert page(name).startswith(f"# {schema['display_name']}\n")


@pytest.mark.parametrize("name", NAMES)
def test_page_is_complete(name):
    assert [section for section in SECTIONS if section not in page(name)] == []


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_there_and_small(name):
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page(name))
    assert pictures
    for picture in pictures:
        assert (PAGES / picture).stat().st_size < 100_000
        assert min(Image.open(PAGES / picture).size) > 100


@pytest.mark.parametrize("name", NAMES)
def test_backticked_inputs_exist_somewhere(name, server):
    """A recipe that names an input which was never there sends people searching."""
    schemas = own_schemas(server.object_info())
    known = {key for schema in schemas.values() for group in schema["input"].values() for key in group} | {
        output for schema in schemas.values() for output in schema["output_name"]
    }
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", page(name), flags=re.DOTALL)
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", prose))
    elsewhere = {"buffalo_l", "buffalo_m", "buffalo_s"}
    assert named - known - elsewhere == set()


@pytest.mark.parametrize("name", NAMES)
def test_the_help_panel_can_fetch_it(name, server):
    assert server.get(f"/extensions/ComfyUI-FusedID/docs/{name}.md").decode() == page(name)
