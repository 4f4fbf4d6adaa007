"""docs/evaluation.md and the shipped protocols say what the code does."""

from __future__ import annotations

import re
import shlex

import pytest
from tiny_run import ROOT

from training.config_table import settings_table
from training.evaluate.__main__ import load_protocol, main, parser, preset_names
from training.evaluate.config import Protocol, RowConfig
from training.evaluate.plan import check_slugs

TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_every_setting_is_documented_as_it_is(capsys):
    for model in (Protocol, RowConfig):
        expected = settings_table(model)
        assert expected.strip() in TEXT
        assert all(row.split("|")[3].strip() for row in expected.splitlines()[2:]), "a setting without a meaning"
    assert main(["--settings"]) == 0
    assert settings_table(RowConfig) in capsys.readouterr().out


def test_every_shipped_protocol_is_described_and_loads():
    assert preset_names() == ["face-fusion", "facestudio", "mini", "unsplash50"]
    assert set(re.findall(r"^\| `([\w-]+)` \| \d+", TEXT, re.MULTILINE)) == set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_protocol_loads_and_its_rows_can_be_chosen_and_changed(name):
    given = ["--protocol", name, "--base", "models/base", "--people", "photos"]
    whole = load_protocol(parser().parse_args(given))
    check_slugs(list(whole.rows))
    assert any(row.adapter == "none" and row.people == 1 for row in whole.rows.values())
    assert whole.draw.steps == 25 and whole.people.photos == "photos"
    first, second = list(whole.rows)[:2]
    part = load_protocol(parser().parse_args([*given, "--rows", second, "--set", f"rows.{second}.strength=0.5"]))
    assert list(part.rows) == [second] and part.rows[second].strength == 0.5
    assert part.comparisons == () and first not in part.rows


@pytest.mark.parametrize("name", preset_names())
def test_the_command_in_a_protocols_first_line_is_one_that_the_command_line_takes(name):
    text = (ROOT / "training" / "configs" / "evaluate" / f"{name}.yaml").read_text(encoding="utf-8")
    words = shlex.split(text.splitlines()[0].removeprefix("# "))
    assert words[:3] == ["python", "-m", "training.evaluate"]
    assert load_protocol(parser().parse_args(words[3:])).name == name


def test_commands_and_overrides_in_the_page_are_real():
    shown = re.findall(r"^python -m training\.evaluate (.+)$", TEXT, re.MULTILINE)
    assert shown and all(load_protocol(parser().parse_args(shlex.split(words))) for words in shown)
    known = {row.split("`")[1] for row in settings_table(Protocol).splitlines()[2:]}
    known |= {f"rows.fused.{row.split('`')[1]}" for row in settings_table(RowConfig).splitlines()[2:]}
    overrides = set(re.findall(r'--set "?([\w.]+)=', TEXT))
    assert overrides <= known and len(overrides) >= 4
