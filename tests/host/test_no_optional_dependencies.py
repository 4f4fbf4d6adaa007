"""The pack loads and lists its nodes with no optional library installed; what needs one names the command to get it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faces.install import onnxruntime_package, pip_install

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(comfyui_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `without_libraries.py` saw in a fresh process."""
    program = ROOT / "tests" / "host" / "without_libraries.py"
    base = tmp_path_factory.mktemp("bare")
    command = [sys.executable, str(program), str(comfyui_checkout), str(base), str(ROOT)]
    result = subprocess.run(command, cwd=base, capture_output=True, text=True, timeout=600)
    lines = [line for line in result.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return json.loads(lines[0].removeprefix("REPORT "))


def test_no_optional_library_is_imported(report: dict[str, Any]) -> None:
    assert report["imported"] == []


def test_the_same_nodes_are_listed_as_with_the_libraries(report: dict[str, Any], pack: Any) -> None:
    assert {node_id: set(inputs) for node_id, inputs in report["nodes"].items()} == {
        node_id: set(node.INPUT_TYPES().get("required", {})) for node_id, node in pack.nodes.items()
    }


@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("embed", pip_install(onnxruntime_package())),
        ("opencv", pip_install("opencv-python-headless")),
        ("prior", "pip install diffusers"),
        ("style", "pip install open_clip_torch"),
    ],
)
def test_what_is_missing_is_said_with_the_command(report: dict[str, Any], what: str, command: str) -> None:
    assert command in report["errors"][what]


def test_the_doctor_works_and_names_the_commands(report: dict[str, Any]) -> None:
    assert "!! onnxruntime is not installed" in report["doctor"]
    assert pip_install(onnxruntime_package()) in report["doctor"]
    assert pip_install("opencv-python-headless") in report["doctor"]
