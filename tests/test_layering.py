"""The import rules of docs/architecture.md, read from the syntax tree of every file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"attention", "faces", "nodes", "training"}
HOST = {
    *("comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras"),
    *("nodes", "server", "execution", "folder_paths", "node_helpers", "latent_preview", "app", "utils", "protocol"),
}
# Folders that a relative import may reach, and our folders that an absolute import may name.
MAY_REACH = {"attention": {"attention"}, "faces": {"faces"}, "nodes": {"nodes", "attention", "faces"}}
MAY_REACH |= {"training": {"training"}}
MAY_NAME = {"attention": set(), "faces": set(), "nodes": set(), "training": {"attention", "faces", "training"}}
# Third parties that a folder may import at module level; everything else is imported where it is used.
AT_TOP = {
    "attention": {"torch", "einops", "safetensors", "numpy"},
    "faces": {"numpy", "PIL", "safetensors"},
    "nodes": {"torch", "einops", "safetensors", "numpy", "PIL"},
}
TRAINING_ONLY = {"accelerate", "peft", "pyarrow", "tensorboard", "webdataset"}


@dataclass(frozen=True)
class Import:
    """One import: `reaches` is the module, as seen from the repository root when it is relative."""

    file: Path
    line: int
    reaches: str
    relative: bool
    at_top: bool

    @property
    def top(self) -> str:
        """The first name of the module."""
        return self.reaches.partition(".")[0]

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.file.relative_to(ROOT).as_posix()}:{self.line} imports {self.reaches}"


def python_files(folder: str) -> list[Path]:
    """Every Python file below a folder of the repository."""
    return sorted((ROOT / folder).rglob("*.py"))


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file; `from .. import attention` reaches `attention`."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    later = {inner for node in ast.walk(tree) if _runs_later(node) for inner in ast.walk(node)}
    at_top = set(ast.walk(tree)) - later
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, relative=False, at_top=node in at_top)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*start, *(node.module or "").split(".")] if node.module else list(start)
            for reached in [".".join(parts)] if parts else [alias.name for alias in node.names]:
                yield Import(file, node.lineno, reached, relative=node.level > 0, at_top=node in at_top)


def _runs_later(node: ast.AST) -> bool:
    """Functions, classes' methods included, run later; what stands under `if TYPE_CHECKING` never does."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports_of(folder: str) -> list[Import]:
    """Every import in a folder."""
    return [found for file in python_files(folder) for found in imports(file)]


def places(found: list[Import]) -> list[str]:
    return [one.place for one in found]


@pytest.mark.parametrize("folder", sorted(OURS))
def test_relative_imports_reach_only_what_the_folder_may_know(folder):
    wrong = [one for one in imports_of(folder) if one.relative and one.top not in MAY_REACH[folder]]
    assert places(wrong) == []


@pytest.mark.parametrize("folder", sorted(OURS))
def test_absolute_imports_name_only_what_the_folder_may_know(folder):
    host_names = HOST if folder == "nodes" else set()
    named = [one for one in imports_of(folder) if not one.relative and one.top in OURS]
    assert places([one for one in named if one.top not in MAY_NAME[folder] | host_names]) == []


@pytest.mark.parametrize("folder", ["attention", "faces", "training"])
def test_only_nodes_import_the_host(folder):
    assert places([one for one in imports_of(folder) if not one.relative and one.top in HOST]) == []


@pytest.mark.parametrize("folder", sorted(AT_TOP))
def test_optional_libraries_are_imported_where_they_are_used(folder):
    known = AT_TOP[folder] | set(sys.stdlib_module_names) | (HOST if folder == "nodes" else set())
    wrong = [one for one in imports_of(folder) if not one.relative and one.at_top and one.top not in known]
    assert places(wrong) == []


@pytest.mark.parametrize("folder", sorted(AT_TOP))
def test_training_libraries_stay_in_training(folder):
    assert places([one for one in imports_of(folder) if one.top in TRAINING_ONLY]) == []


def test_the_host_room_knows_no_node():
    """`nodes/host` is what nodes stand on: it reaches itself and `attention`."""
    own = [one for one in imports_of("nodes/host") if one.relative]
    assert own
    assert places([one for one in own if one.top != "attention" and not one.reaches.startswith("nodes.host")]) == []


def test_the_injection_points_are_the_host_rooms_alone():
    """Wrappers, replaced layers and the options of a call are read and written in one place."""
    words = ("patches_replace", "cond_or_uncond", "WrappersMP", "CallbacksMP", "current_patcher", '"n_heads"')
    found = [
        f"{file.relative_to(ROOT).as_posix()}: {word}"
        for file in python_files("nodes")
        if "host" not in file.relative_to(ROOT).parts
        for word in words
        if word in file.read_text(encoding="utf-8")
    ]
    assert found == []


def test_tests_import_the_host_only_inside_functions():
    found = [one for one in imports_of("tests") if one.at_top and one.top in HOST]
    assert places(found) == []


def test_benchmarks_stand_alone():
    """They load the pack through the host, as a user's ComfyUI does, and nothing of ours needs them."""
    own = imports_of("benchmarks")
    assert places([one for one in own if one.relative and one.top != "benchmarks"]) == []
    absolute = [one for one in own if not one.relative]
    assert places([one for one in absolute if one.top in OURS or (one.at_top and one.top in HOST)]) == []
    assert places([one for folder in OURS for one in imports_of(folder) if one.top == "benchmarks"]) == []


def test_root_imports_nothing_at_module_level():
    assert places([one for one in imports(ROOT / "__init__.py") if one.at_top]) == []


@pytest.mark.parametrize("folder", sorted(OURS))
def test_nothing_is_printed(folder):
    calls = [
        f"{file.relative_to(ROOT).as_posix()}:{node.lineno}"
        for file in python_files(folder)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_the_walk_sees_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "attention" / "community" / "bad.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ...nodes.patch import x\nfrom ... import faces\nfrom ..grid import y\ndef f():\n    import cv2\n"
    )
    found = list(imports(file))
    assert [(one.reaches, one.at_top) for one in found] == [
        ("nodes.patch", True),
        ("faces", True),
        ("attention.grid", True),
        ("cv2", False),
    ]
