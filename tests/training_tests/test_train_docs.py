"""docs/training.md says what the code does."""

from __future__ import annotations

import re

import pytest
from tiny_run import ROOT

from training.config import TrainConfig
from training.config_io import load_config
from training.config_table import settings_table
from training.cost import cost, table
from training.train import main

TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_every_setting_is_documented_as_it_is(capsys):
    expected = settings_table(TrainConfig)
    assert expected.strip() in TEXT
    assert all(row.split("|")[3].strip() for row in expected.splitlines()[2:]), "a setting without a meaning"
    assert main(["--settings"]) == 0
    assert capsys.readouterr().out == expected


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"training/configs/[\w/]+\.yaml", TEXT))
    assert len(named) >= 5
    assert all((ROOT / name).is_file() for name in named)


def test_every_override_that_is_shown_is_a_setting():
    shown = set(re.findall(r"--set ([\w.]+)=", TEXT)) - {"section.name"}
    known = {row.split("`")[1] for row in settings_table(TrainConfig).splitlines()[2:]}
    assert shown <= known and len(shown) >= 5
    load_config(TrainConfig, None, ["model.base=x", "data.root=y", "ema.decay=null"])


def test_the_cost_table_is_what_the_command_prints(sd15_cost):
    assert table([sd15_cost]).splitlines()[2] in TEXT


@pytest.mark.slow
@pytest.mark.parametrize(("family", "resolution"), [("sd15", 1024), ("sdxl", 512), ("sdxl", 1024)])
def test_the_rest_of_the_cost_table_is_what_the_command_prints(family, resolution):
    assert table([cost(family, resolution)]).splitlines()[2] in TEXT
