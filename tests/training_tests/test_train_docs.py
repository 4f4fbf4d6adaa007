"""docs/training.md says what the code does."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil

import pytest
from tiny_run import ROOT

from training.config import TrainConfig
from training.config_io import load_config
from training.config_table import settings_table
from training.cost import beside_line, cost, table
from training.train import main

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
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


def commands(heading: str) -> list[list[str]]:
    """The command lines of the first block below a heading, as words."""
    block = TEXT.split(f"\n## {heading}\n")[1].split("```")[1].replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


def test_the_install_command_names_every_requirement():
    words = shlex.split(TEXT.split("```")[1].replace("\\\n", " "))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    assert words[:2] == ["pip", "install"]
    versions = {line.split(";")[0].strip() for line in wanted}
    assert set(words[2:]) == {version for version in versions if not version.startswith("onnxruntime-gpu")}


@pytest.mark.assets
def test_the_three_commands_run_as_printed(assets, tiny_base, tmp_path, monkeypatch, caplog):
    """In a fresh folder with a few real portraits; the tiny base and small sizes are added behind."""
    (tmp_path / "photos").mkdir()
    for photo in sorted((assets / "faces" / "congress_gpo_450x550").glob("*.jpg"))[:8]:
        shutil.copy(photo, tmp_path / "photos")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd15").symlink_to(tiny_base)
    (tmp_path / "training").symlink_to(ROOT / "training")
    monkeypatch.chdir(tmp_path)
    faces = ["faces.pack=test_pack", f"faces.roots=[{assets / 'insightface'}]", "run.executor=inline"]
    small = ["select.min_side=400", "crops.resolution=64", "crops.reference_size=64"]
    model = ["model.family=auto", "engine.precision=fp32", "engine.device=cpu", "log.trackers=[]"]
    short = ["data.resolution=64", "data.workers=0", "reference.size=64", "schedule.steps=2", "schedule.warmup=0"]
    added = {"prepare": [*faces, *small], "train": [*model, *short], "export": []}
    ran = []
    for words in commands("Three commands"):
        assert words[:2] == ["python", "-m"]
        name = words[2].removeprefix("training.")
        module = importlib.import_module("training.prepare.__main__" if name == "prepare" else words[2])
        assert module.main([*words[3:], *(word for setting in added[name] for word in ("--set", setting))]) == 0
        ran.append(name)
    assert ran == ["prepare", "train", "export"]
    assert "prepared has no validation split" in caplog.text
    assert sorted(path.name for path in (tmp_path / "release").iterdir()) == ["README.md", "adapter.safetensors"]
    assert "8 kept" in (tmp_path / "prepared" / "report.md").read_text(encoding="utf-8")


def test_the_cost_table_is_what_the_command_prints(sd15_cost):
    assert table([sd15_cost]).splitlines()[2] in TEXT
    assert beside_line() in TEXT


@pytest.mark.slow
@pytest.mark.parametrize(("family", "resolution"), [("sd15", 1024), ("sdxl", 512), ("sdxl", 1024)])
def test_the_rest_of_the_cost_table_is_what_the_command_prints(family, resolution):
    assert table([cost(family, resolution)]).splitlines()[2] in TEXT


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs" / "mini").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_of_the_miniature_loads_and_is_in_the_page(path):
    assert f"training/configs/mini/{path.name}" in TEXT
    if path.stem != "prepare":
        command = path.read_text(encoding="utf-8").splitlines()[0]
        assert f"--config training/configs/mini/{path.name}" in command
        config = load_config(TrainConfig, str(path), ["model.base=base", "data.root=data"])
        assert config.run == f"runs/mini_{path.stem}"
