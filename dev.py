"""Runs FusedID's tests and its demo in environments of their own; needs nothing but Python.

    python dev.py test [pytest arguments]          lint, types, tests on the newest ComfyUI, host tests on the oldest
    python dev.py test --hosts all [...]           the same, host tests on every ComfyUI found
    python dev.py test --hosts 0.8.0 [...]         host tests only, on that ComfyUI only
    python dev.py demo [--photo FILE]              a real face through the shipped miniature, one sheet
    python dev.py demo --comfyui PATH              the same through the real ComfyUI server
    python dev.py workflows --comfyui PATH         rewrites example_workflows from its API forms
    python dev.py subgraphs --comfyui PATH         rewrites the blueprints of the node library
    python dev.py contract --comfyui PATH          promises new nodes and inputs; refuses a broken promise
    python dev.py host --comfyui PATH              records what this pack relies on in that ComfyUI
    python dev.py locales --comfyui PATH           rewrites locales/en and says what to translate
    python dev.py pages --comfyui PATH             rewrites the input lists of the help pages
    python dev.py pictures --comfyui PATH [NAME]   draws thumbnails, help pictures and the README's with Chromium

ComfyUI checkouts are those in COMFYUI_PATH (a path list; `none` for none), else every ~/ComfyUI*. They are only read.
Each has an environment beside this file, with requirements-dev.txt and its own requirements (frontend, libraries):
`.venv` for the newest one or for none, `.venv-<version>` for every other. Works on Linux, macOS and Windows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEV_REQUIREMENTS = ROOT / "requirements-dev.txt"
TORCHVISION = "torchvision==0.28.0"  # the release made for requirements-dev's torch
NOT_FROM_HOST = ("torch", "torchvision", "torchaudio")
SCRIPTS = {
    "demo": "host/demo.py",
    "workflows": "host/build_workflows.py",
    "subgraphs": "host/build_subgraphs.py",
    "contract": "host/build_contract.py",
    "host": "robustness/host_contract.py",
    "locales": "host/build_locales.py",
    "pages": "host/build_help.py",
    "pictures": "browser/pictures.py",
}
MYPY_PACKAGES = ("attention", "faces", "training")
LINT = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy", *(argument for package in MYPY_PACKAGES for argument in ("-p", package))],
}
NOTHING_SELECTED = 5
"""pytest's exit status when no test was left to run."""


@dataclass(frozen=True)
class Checkout:
    """A ComfyUI on disk and the version it calls itself."""

    path: Path
    version: str

    @property
    def age(self) -> list[int]:
        """Sorts versions, the oldest first; an unknown version is the oldest."""
        return [int(part) for part in re.findall(r"\d+", self.version)]


def main(argv: Sequence[str]) -> int:
    """Parses the command line; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--python", type=Path, help="use this interpreter as it is and install nothing")
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("test", help="ruff, mypy and pytest; see test --help", allow_abbrev=False)
    test.add_argument("--hosts", default="ends", help="ends (default): newest and oldest; all; or versions, by commas")
    test.add_argument("--strict", action="store_true", help="fail when ComfyUI or the assets are there and no test ran")
    test.add_argument("-m", dest="marks", help="pytest's marker expression; further arguments go to pytest too")
    commands.add_parser("demo", help="a real face through the shipped miniature; see demo --help", add_help=False)
    commands.add_parser("workflows", help="UI forms of the examples; see workflows --help", add_help=False)
    commands.add_parser("subgraphs", help="blueprints of the node library; see subgraphs --help", add_help=False)
    commands.add_parser("contract", help="what saved workflows rely on; see contract --help", add_help=False)
    commands.add_parser("host", help="what this pack relies on in ComfyUI; see host --help", add_help=False)
    commands.add_parser("locales", help="texts of the nodes; see locales --help", add_help=False)
    commands.add_parser("pages", help="input lists of the help pages; see pages --help", add_help=False)
    commands.add_parser("pictures", help="thumbnails and help pictures; see pictures --help", add_help=False)
    options, rest = parser.parse_known_args(argv)
    if sys.version_info < (3, 10):  # noqa: UP036  started by whatever Python the user has
        parser.error(f"this is Python {sys.version.split()[0]}; FusedID needs 3.10 or newer")
    return run_tests(options, rest) if options.command == "test" else run_script(options, rest)


def run_tests(options: argparse.Namespace, pytest_arguments: Sequence[str]) -> int:
    """Lint, types and every test with the newest checkout, then the host tests with others. Prints what ran where."""
    started, checkouts = time.monotonic(), find_checkouts()
    newest, others = choose_hosts(checkouts, options.hosts)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.jsonl"
        if options.hosts in ("ends", "all"):
            python = prepare(options, newest)
            failed += [name for name, arguments in LINT.items() if run(python, "-m", *arguments)]
            if run_pytest(python, newest, pytest_arguments, options.marks, counts):
                failed.append("pytest")
        for host in others:
            marks = f"host and ({options.marks})" if options.marks else "host"
            code = run_pytest(prepare(options, host), host, pytest_arguments, marks, counts)
            if code not in (0, NOTHING_SELECTED):
                failed.append(f"host tests with ComfyUI {host.version}")
        lines = counts.read_text(encoding="utf-8").splitlines() if counts.exists() else []
    found = [json.loads(line) for line in lines]
    print("\n".join(["", *(entry["line"] for entry in found)]))
    if options.strict:
        failed += [f"no {entry['line'].split(':')[0]} ran" for entry in found if entry["possible"] and not entry["ran"]]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all green"
    print(f"dev.py test: {verdict} ({(time.monotonic() - started) / 60:.0f} minutes)", flush=True)
    return 1 if failed else 0


def run_pytest(
    python: Path, checkout: Checkout | None, arguments: Sequence[str], marks: str | None, counts: Path
) -> int:
    """pytest with one checkout; tests/conftest.py appends to `counts` what ran and what was skipped."""
    env = {"COMFYUI_PATH": str(checkout.path) if checkout else "none", "FUSEDID_COUNTS": str(counts)}
    return run(python, "-m", "pytest", *(["-m", marks] if marks else []), *arguments, env=env)


def run_script(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs a script of tests in the environment of the checkout it names; what is no checkout it refuses itself."""
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--comfyui", type=Path)
    path = named.parse_known_args(arguments)[0].comfyui
    python = prepare(options, read_checkout(path) if path and is_checkout(path) else None)
    return run(python, str(ROOT / "tests" / SCRIPTS[options.command]), *arguments)


def choose_hosts(checkouts: Sequence[Checkout], wanted: str) -> tuple[Checkout | None, list[Checkout]]:
    """The newest checkout, for everything, and those for host tests only. SystemExit for a version that is absent."""
    newest = checkouts[0] if checkouts else None
    if wanted in ("ends", "all"):
        return newest, list(checkouts[1:] if wanted == "all" else checkouts[1:][-1:])
    by_version = {checkout.version: checkout for checkout in checkouts}
    versions = wanted.split(",")
    absent = [version for version in versions if version not in by_version]
    if absent:
        sys.exit(f"no ComfyUI {', '.join(absent)}; found are {', '.join(by_version) or 'none'} (or: ends, all)")
    return newest, [by_version[version] for version in versions]


def find_checkouts() -> list[Checkout]:
    """The newest first: those COMFYUI_PATH names, else every ~/ComfyUI*. SystemExit when a named one is none."""
    value = os.environ.get("COMFYUI_PATH", "")
    if value == "none":
        return []
    named = [Path(entry).expanduser() for entry in value.split(os.pathsep) if entry]
    wrong = [str(path) for path in named if not is_checkout(path)]
    if wrong:
        sys.exit(f"COMFYUI_PATH names {', '.join(wrong)}, where there is no nodes.py; correct it, or set it to none")
    return newest_first(map(read_checkout, named)) if named else checkouts_at_home()


def checkouts_at_home() -> list[Checkout]:
    """Every ~/ComfyUI*, the newest first."""
    return newest_first(read_checkout(path) for path in Path.home().glob("ComfyUI*") if is_checkout(path))


def newest_first(checkouts: Iterable[Checkout]) -> list[Checkout]:
    return sorted(checkouts, key=lambda checkout: (checkout.age, str(checkout.path)), reverse=True)


def is_checkout(path: Path) -> bool:
    return (path / "nodes.py").is_file()


def read_checkout(path: Path) -> Checkout:
    """Its version is `unknown` before 2025."""
    file = path / "comfyui_version.py"
    found = re.search(r'"([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return Checkout(path.resolve(), found.group(1) if found else "unknown")


def environment(venv: Path, checkout: Checkout | None) -> Path:
    """`.venv` for the newest ComfyUI there is, whichever is asked for, so that no call exchanges its libraries."""
    if checkout is None or newest_first([checkout, *find_checkouts(), *checkouts_at_home()])[0].age == checkout.age:
        return venv
    return venv.with_name(f"{venv.name}-{checkout.version}")


def prepare(options: argparse.Namespace, checkout: Checkout | None) -> Path:
    """The interpreter to run with; makes the environment, and installs when a requirement file has changed."""
    if options.python:
        return options.python
    venv = environment(options.venv, checkout)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"Making {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    text = DEV_REQUIREMENTS.read_text(encoding="utf-8")
    install_once(python, "dev", text, ["-r", str(DEV_REQUIREMENTS)])
    if checkout:
        wanted = host_requirements(checkout.path)
        install_once(python, "torchvision", text + TORCHVISION, ["--no-deps", TORCHVISION])
        install_once(python, "host", text + "\n".join(wanted), ["-c", str(constraints(venv, text)), *wanted])
    return python


def host_requirements(checkout: Path) -> list[str]:
    """ComfyUI's requirements without torch and its companions, and `requests`, which some versions forget."""
    lines = (checkout / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    return [line for line in wanted if line and re.split(r"[^\w-]", line)[0] not in NOT_FROM_HOST] + ["requests"]


def constraints(venv: Path, requirements: str) -> Path:
    """A pip constraint file with the pins of requirements-dev, so that nothing of ComfyUI's exchanges torch."""
    path = venv / "constraints.txt"
    pins = [line for line in requirements.splitlines() if "==" in line and not line.startswith("#")]
    path.write_text("\n".join(pins) + "\n", encoding="utf-8")
    return path


def install_once(python: Path, name: str, wanted: str, pip_arguments: Sequence[str]) -> None:
    """`pip install`, unless the stamp says that exactly this was installed before."""
    stamp = python.parents[1] / f"installed-{name}.sha256"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    print(f"Installing {name} requirements into {python.parents[1]}", flush=True)
    # Twice quiet: errors only. Once would tell every folder that --find-links names in vain.
    subprocess.run([str(python), "-m", "pip", "install", "-qq", *pip_arguments], check=True)
    stamp.write_text(digest)


def run(python: Path, *arguments: str, env: dict[str, str] | None = None) -> int:
    """Runs the interpreter in the repository root; returns its exit status."""
    checkout = f"COMFYUI_PATH={env['COMFYUI_PATH']} " if env else ""
    print(f"$ {checkout}{python} {' '.join(arguments)}", flush=True)
    return subprocess.run([str(python), *arguments], cwd=ROOT, env={**os.environ, **(env or {})}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
