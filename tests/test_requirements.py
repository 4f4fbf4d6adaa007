"""requirements.txt is what pyproject.toml wants beyond ComfyUI; nothing is pinned upwards for users."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
# ComfyUI's own requirements.txt has these (read in 0.3.64 to 0.33.0).
IN_COMFYUI = {"torch", "einops", "safetensors", "numpy", "pillow", "transformers", "scipy"}

OURS = {"attention", "faces", "training"}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch", "skimage": "scikit-image"}


def lines(name: str) -> list[str]:
    """The requirements of a file, without comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    """The distribution name, lower case."""
    return re.split(r"[\s<>=!~;\[]", requirement)[0].lower()


def test_requirements_are_pyprojects_beyond_comfyui():
    beyond = [line for line in project()["dependencies"] if name_of(line) not in IN_COMFYUI]
    assert sorted(lines("requirements.txt")) == sorted(beyond)


def test_nothing_is_pinned_upwards_for_users():
    wanted = [*lines("requirements.txt"), *project()["dependencies"]]
    extras = [line for group in project().get("optional-dependencies", {}).values() for line in group]
    versions = [line.split(";")[0] for line in wanted + extras]
    assert [line for line in versions if re.search(r"<|==|~=", line)] == []


def test_development_set_trains_and_leaves_torchvision_out():
    names = {name_of(line) for line in lines("requirements-dev.txt")}
    assert "torchvision" not in names
    extras = project()["optional-dependencies"]
    train = {name_of(line) for line in [*extras["train"], *extras["ray"]]}
    assert train - {"open_clip_torch"} <= names  # open_clip needs torchvision
    assert {name_of(line) for line in lines("requirements.txt")} - {"onnxruntime-gpu"} <= names


def test_the_workflow_tests_the_oldest_comfyui_we_allow_and_the_newest_we_know():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    (tags,) = re.findall(r"comfyui: \[(.*)\]", text)
    recorded = [path.stem for path in (ROOT / "tests" / "data" / "host_contract").glob("*.json")]
    newest = max(recorded, key=lambda version: [int(part) for part in version.split(".")])
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    oldest = settings["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert tags.split(", ") == [f"v{oldest}", f"v{newest}", "master"]
    assert f"ref: v{oldest}" in text  # the oldest libraries


def test_every_library_that_training_imports_is_declared():
    extras = project()["optional-dependencies"]
    declared = {
        name_of(line) for line in [*project()["dependencies"], *(x for group in extras.values() for x in group)]
    }
    imported = {
        name.split(".")[0]
        for path in (ROOT / "training").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported_names(node)
    }
    # Only for type checkers; pydantic brings it along.
    libraries = imported - set(sys.stdlib_module_names) - OURS - {"typing_extensions"}
    assert {DISTRIBUTIONS.get(name, name) for name in libraries} - declared == set()
    assert {"tqdm", "fsspec", "ray", "bitsandbytes"} <= libraries


def imported_names(node: ast.AST) -> list[str]:
    """Modules that a statement imports, relative ones left out."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
