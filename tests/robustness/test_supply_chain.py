"""Declared libraries are explained, the oldest ones are those declared, and licences stand where models are chosen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from faces.doctor import pack_findings
from faces.pack_choice import pack_choices
from faces.packs import KNOWN_PACKS, PUBLISHED_SHA256

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def named(requirement: str) -> tuple[str, str]:
    """(name in lower case, lower bound or nothing)."""
    found = re.match(r"([\w.-]+)(?:\[\w+\])?(?:>=([\d.]+))?", requirement)
    assert found
    return found[1].lower(), found[2] or ""


def rows() -> dict[str, list[str]]:
    """Cells of the tables of docs/dependencies.md by library."""
    tables = [line.strip("| \n").split(" | ") for line in DOCS.splitlines() if line.startswith("| ")]
    return {name.strip(): cells[1:] for cells in tables for name in cells[0].lower().split(",")}


def test_every_library_is_justified_with_its_licence() -> None:
    extras = [line for group in PROJECT["optional-dependencies"].values() for line in group]
    declared = {named(line)[0] for line in [*PROJECT["dependencies"], *extras]}
    assert declared - set(rows()) == set()
    assert all(len(cells[-2]) > 5 and cells[-1] for name, cells in rows().items() if name in declared)


def test_the_oldest_set_is_the_declared_lower_bounds() -> None:
    lines = (ROOT / "requirements-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    declared = dict(named(line) for line in PROJECT["dependencies"])
    declared.pop("onnxruntime-gpu")
    for name, bound in declared.items():
        assert bound, f"{name} has no lower bound"
        assert pinned[name] == bound or pinned[name] == f"{bound}.0", name
        assert rows()[name][0] == bound, f"docs/dependencies.md names another bound for {name}"


def test_face_models_show_licence_and_size_where_they_are_chosen(tmp_path: Path) -> None:
    downloads = [choice for choice in pack_choices([tmp_path]) if "(download" in choice]
    assert len(downloads) == len(KNOWN_PACKS)
    for known, choice in zip(KNOWN_PACKS, downloads):
        assert known.license in choice and f"{known.megabytes} MB" in choice
        assert known.detector in PUBLISHED_SHA256 and known.recogniser in PUBLISHED_SHA256
    told = "\n".join(finding.text for finding in pack_findings([tmp_path]))
    assert all(f"{known.name} is not here (licence: {known.license}" in told for known in KNOWN_PACKS)


def test_our_code_runs_no_text_as_code_and_installs_nothing() -> None:
    """The registry forbids it, and so do we: eval, exec, os.system, subprocess and pip calls."""
    forbidden = re.compile(r"(?<![\w.])(eval|exec)\(|os\.system|subprocess|pickle\.loads?\(|weights_only=False")
    files = [file for folder in ("nodes", "attention", "faces") for file in (ROOT / folder).rglob("*.py")]
    allowed = {"provider_probe.py"}  # starts this very Python, to see whether a provider's libraries load
    found = [file.name for file in files if forbidden.search(file.read_text(encoding="utf-8"))]
    assert set(found) <= allowed and len(files) > 50
