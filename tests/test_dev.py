"""dev.py: what it installs, when, which checkouts it tests with, what it counts. No package is installed here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import demo
import pytest
import run_counts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dev():
    spec = importlib.util.spec_from_file_location("fusedid_dev", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_checkout(folder, version):
    folder.mkdir(parents=True)
    (folder / "nodes.py").write_text("")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"')
    lines = ["torch", "torchsde", "torchvision", "torchaudio", "numpy>=1.25.0  # why", "", "# rest:", "aiohttp>=3.11.8"]
    (folder / "requirements.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with three checkouts; the newest is neither the first by name nor the longest version."""
    for name, version in (("ComfyUI", "0.3.64"), ("ComfyUI-new", "0.33.0"), ("ComfyUI-old", "0.8.0")):
        make_checkout(tmp_path / "home" / name, version)
    (tmp_path / "home" / "ComfyUI-notes").mkdir()
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path / "home"


@pytest.fixture
def checkout(home):
    return home / "ComfyUI"


def test_host_requirements_leave_torch_and_its_companions_alone(dev, checkout):
    assert dev.host_requirements(checkout) == ["torchsde", "numpy>=1.25.0", "aiohttp>=3.11.8", "requests"]


def test_constraints_pin_torch(dev, tmp_path):
    text = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    assert dev.constraints(tmp_path, text).read_text().splitlines()[0] == "torch==2.13.0"


def test_lint_is_pinned_so_that_a_release_of_it_breaks_nothing():
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split("==")[0] for line in lines if "==" in line} == {"torch", "ruff", "mypy"}


def versions(checkouts):
    return [checkout.version for checkout in checkouts]


def test_checkouts_are_those_at_home_or_in_the_variable_the_newest_first(dev, home, tmp_path, monkeypatch):
    assert versions(dev.find_checkouts()) == ["0.33.0", "0.8.0", "0.3.64"]
    other = make_checkout(tmp_path / "other", "0.28.0")
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join([str(home / "ComfyUI"), str(other)]))
    assert [checkout.path for checkout in dev.find_checkouts()] == [other.resolve(), (home / "ComfyUI").resolve()]
    monkeypatch.setenv("COMFYUI_PATH", "none")
    assert dev.find_checkouts() == []
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "absent"))
    with pytest.raises(SystemExit, match="absent"):
        dev.find_checkouts()


@pytest.mark.parametrize(
    ("wanted", "others"),
    [("ends", ["0.3.64"]), ("all", ["0.8.0", "0.3.64"]), ("0.8.0", ["0.8.0"]), ("0.3.64,0.33.0", ["0.3.64", "0.33.0"])],
)
def test_host_tests_run_on_the_hosts_that_are_asked_for(dev, home, wanted, others):
    newest, found = dev.choose_hosts(dev.find_checkouts(), wanted)
    assert newest.version == "0.33.0" and versions(found) == others


def test_one_checkout_is_not_tested_twice_and_none_is_fine(dev, home):
    assert dev.choose_hosts(dev.find_checkouts()[:1], "all")[1] == []
    assert dev.choose_hosts([], "ends") == (None, [])
    with pytest.raises(SystemExit, match=r"no ComfyUI 0\.9\.0; found are 0\.33\.0"):
        dev.choose_hosts(dev.find_checkouts(), "0.9.0")


def test_every_checkout_has_its_own_environment_whichever_is_named(dev, home, monkeypatch):
    def folders():
        return [dev.environment(Path(".venv"), checkout).name for checkout in dev.find_checkouts()]

    assert folders() == [".venv", ".venv-0.8.0", ".venv-0.3.64"]
    monkeypatch.setenv("COMFYUI_PATH", str(home / "ComfyUI"))
    assert folders() == [".venv-0.3.64"]
    assert dev.environment(Path(".venv"), None) == Path(".venv")


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
    assert dev.prepare(options, dev.read_checkout(checkout)) == Path(sys.executable)


@pytest.fixture
def calls(dev, home, monkeypatch):
    """Replaces what dev.py starts: lists (module, version of the ComfyUI, -m expression); `.codes` by the module."""

    class Calls(list):
        codes: ClassVar[dict[str, int]] = {}

    made = Calls()

    def run(python, *arguments, env=None):
        marks = arguments[arguments.index("-m", 1) + 1] if "-m" in arguments[1:] else None
        version = dev.read_checkout(Path(env["COMFYUI_PATH"])).version if env else None
        made.append((arguments[1], version, marks))
        return made.codes.get(arguments[1], 0)

    monkeypatch.setattr(dev, "prepare", lambda *_: Path("python"))
    monkeypatch.setattr(dev, "run", run)
    return made


LINT = [("ruff", None, None), ("ruff", None, None), ("mypy", None, None)]


def test_every_step_runs_and_a_failing_one_fails_the_whole(dev, calls, capsys):
    calls.codes = {"mypy": 1}
    assert dev.main(["test", "-k", "grid"]) == 1
    assert calls == [*LINT, ("pytest", "0.33.0", None), ("pytest", "0.3.64", "host")]
    assert "FAILED: mypy" in capsys.readouterr().out


def test_a_named_version_runs_its_host_tests_only(dev, calls):
    assert dev.main(["test", "--hosts", "0.8.0", "-m", "not slow", "tests/host"]) == 0
    assert calls == [("pytest", "0.8.0", "host and (not slow)")]


def test_a_selection_without_host_tests_is_no_failure_of_the_oldest_host(dev, calls):
    calls.codes = {"pytest": dev.NOTHING_SELECTED}
    assert dev.main(["test", "--hosts", "0.8.0", "tests/test_dev.py"]) == 0
    assert dev.main(["test", "tests/empty.py"]) == 1


@pytest.mark.parametrize(("ran", "possible", "code"), [(0, True, 1), (0, False, 0), (3, True, 0)])
def test_strict_wants_host_tests_where_there_is_a_host(dev, home, calls, monkeypatch, capsys, ran, possible, code):
    line = f"HOST TESTS (ComfyUI 0.33.0): {ran} ran, 7 skipped"

    def run_pytest(python, checkout, arguments, marks, counts):
        counts.write_text(json.dumps({"line": line, "ran": ran, "possible": possible}) + "\n")
        return 0

    monkeypatch.setattr(dev, "run_pytest", run_pytest)
    assert dev.main(["test"]) == 0
    assert dev.main(["test", "--strict"]) == code
    out = capsys.readouterr().out
    assert out.count(f"\n{line}\n") == 2  # the last lines, after all that pytest says
    assert ("FAILED: no HOST TESTS (ComfyUI 0.33.0) ran" in out) == bool(code)


def report(nodeid, reason=None):
    return SimpleNamespace(nodeid=nodeid, longrepr=reason and ("file.py", 3, f"Skipped: {reason}"))


def test_what_ran_is_counted_once_and_what_did_not_by_its_reason():
    stats = {
        "passed": [report("a"), report("b"), report("elsewhere")],
        "error": [report("b")],  # its fixture failed when it ended
        "skipped": [
            report("c", "no X in /peers: set Y"),
            report("d", "no X in /peers: set Y"),
            report("e", "needs a GPU"),
        ],
    }
    ran, skipped = run_counts.run_and_skipped(stats, {*"abcde"})
    assert run_counts.sentence(ran, skipped) == "2 ran, 3 skipped (2: no X in /peers; 1: needs a GPU)"
    assert run_counts.sentence(0, Counter()) == "0 ran, 0 skipped"


OUTPUT_FOLDERS = ("demo", "models", "output", "prepared", "release", "runs")


@pytest.fixture
def scratch(tmp_path):
    """A repository of its own with our sources, as a fresh clone has them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this copy of the repository is no git checkout")
    files = subprocess.run(["git", "ls-files", "-z", "*.py", "*.toml", ".gitignore"], cwd=ROOT, capture_output=True)
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    return tmp_path


def make_outputs(folder):
    """What the demo, the trainer and users write into the repository, with a file that ruff would not like."""
    for name in OUTPUT_FOLDERS:
        (folder / name).mkdir()
        (folder / name / "sheet.png").write_bytes(b"")
        (folder / name / "script.py").write_text("import sys,os")


@pytest.mark.parametrize("git", [True, False])
def test_what_the_demo_and_the_trainer_write_does_not_change_the_lint(scratch, git):
    """`python dev.py demo` and `python dev.py test` in both orders: demo/ once changed how imports are sorted."""
    if not git:
        shutil.rmtree(scratch / ".git")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."]
    before = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    make_outputs(scratch)
    after = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if "No module named ruff" in before.stderr:
        pytest.skip("ruff is not installed")
    assert (after.returncode, after.stdout) == (before.returncode, before.stdout)


def test_what_the_demo_and_the_trainer_write_is_not_offered_to_git(scratch):
    assert demo.parse([]).out == ROOT / "demo"
    make_outputs(scratch)
    state = subprocess.run(["git", "status", "--porcelain"], cwd=scratch, capture_output=True, text=True, check=True)
    assert [line for line in state.stdout.splitlines() if not line.startswith("A ")] == []
