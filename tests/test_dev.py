"""dev.py: what it installs, when, and which checkouts it tests with. No package is installed here."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dev():
    spec = importlib.util.spec_from_file_location("fusedid_dev", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "ComfyUI"
    folder.mkdir()
    (folder / "nodes.py").write_text("")
    lines = ["torch", "torchsde", "torchvision", "torchaudio", "numpy>=1.25.0  # why", "", "# rest:", "aiohttp>=3.11.8"]
    (folder / "requirements.txt").write_text("\n".join(lines))
    return folder


def test_host_requirements_leave_torch_and_its_companions_alone(dev, checkout):
    assert dev.host_requirements(checkout) == ["torchsde", "numpy>=1.25.0", "aiohttp>=3.11.8", "requests"]


def test_constraints_pin_torch(dev, tmp_path):
    text = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    assert dev.constraints(tmp_path, text).read_text().splitlines() == ["torch==2.13.0"]


def test_checkouts_come_from_the_variable_in_order(dev, checkout, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "nodes.py").write_text("")
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join([str(other), str(checkout)]))
    assert dev.find_checkouts() == [other.resolve(), checkout.resolve()]
    monkeypatch.setenv("COMFYUI_PATH", "none")
    assert dev.find_checkouts() == []
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "absent"))
    with pytest.raises(SystemExit, match="absent"):
        dev.find_checkouts()


def test_nothing_is_installed_twice_and_everything_after_a_change(dev, tmp_path, monkeypatch):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    calls: list[list[str]] = []
    monkeypatch.setattr(dev.subprocess, "run", lambda command, **_: calls.append(command))
    for wanted in ("a", "a", "a\nb"):
        dev.install_once(python, "dev", wanted, ["-r", "file"])
    assert [call[-2:] for call in calls] == [["-r", "file"]] * 2


def test_failed_installation_is_tried_again(dev, tmp_path, monkeypatch):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)

    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(dev.subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            dev.install_once(python, "dev", "a", [])


def test_given_interpreter_is_used_as_it_is(dev, checkout, monkeypatch):
    monkeypatch.setattr(dev.subprocess, "run", lambda *_, **__: pytest.fail("nothing may be run"))
    options = argparse.Namespace(python=Path(sys.executable), venv=Path("unused"))
    assert dev.prepare(options, [checkout]) == Path(sys.executable)


def test_every_step_runs_and_a_failing_one_fails_the_whole(dev, checkout, monkeypatch, capsys):
    ran = []
    monkeypatch.setenv("COMFYUI_PATH", str(checkout))
    monkeypatch.setattr(dev, "prepare", lambda *_: Path("python"))
    monkeypatch.setattr(dev, "run", lambda _, *arguments, env: ran.append(arguments[1]) or int(arguments[1] == "mypy"))
    assert dev.main(["test", "-k", "grid"]) == 1
    assert ran == ["ruff", "ruff", "mypy", "pytest"]
    assert "FAILED: mypy" in capsys.readouterr().out
