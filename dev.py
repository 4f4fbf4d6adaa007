"""Runs FusedID's tests and its demo in an environment of their own; needs nothing but Python.

    python dev.py test [pytest arguments]              lint, types and tests in .venv
    python dev.py demo [--photo FILE]                  a real face through the shipped miniature, one sheet
    python dev.py demo --comfyui PATH [--photo FILE]   the same through the real ComfyUI server
    python dev.py workflows --comfyui PATH             rewrites example_workflows from its API forms
    python dev.py subgraphs --comfyui PATH             rewrites the blueprints of the node library
    python dev.py contract --comfyui PATH              promises new nodes and inputs; refuses a broken promise
    python dev.py host --comfyui PATH                  records what this pack relies on in that ComfyUI
    python dev.py locales --comfyui PATH               rewrites locales/en and says what to translate
    python dev.py pages --comfyui PATH                 rewrites the input lists of the help pages
    python dev.py pictures --comfyui PATH [NAME ...]   draws thumbnails, help pictures and the README's with Chromium

`.venv` is made beside this file and filled from requirements-dev.txt. When a ComfyUI checkout is found (COMFYUI_PATH, a
path list; else ~/ComfyUI; `none` for none), its requirements are added so that the host tests run. The checkout and its
own environment are only read. Works on Linux, macOS and Windows.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
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


def main(argv: Sequence[str]) -> int:
    """Parses the command line; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--python", type=Path, help="use this interpreter as it is and install nothing")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("test", help="ruff, mypy and pytest; further arguments go to pytest", add_help=False)
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
    """Ruff, mypy and pytest; with several checkouts the host tests run once more for each further one."""
    checkouts = find_checkouts()
    python = prepare(options, checkouts)
    steps = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy", *(argument for package in MYPY_PACKAGES for argument in ("-p", package))],
        "pytest": ["pytest", *pytest_arguments],
    }
    first = {"COMFYUI_PATH": str(checkouts[0]) if checkouts else "none"}
    failed = [name for name, arguments in steps.items() if run(python, "-m", *arguments, env=first)]
    for checkout in checkouts[1:]:
        if run(python, "-m", "pytest", "-m", "host", *pytest_arguments, env={"COMFYUI_PATH": str(checkout)}):
            failed.append(f"host tests with {checkout}")
    print(f"dev.py test: {'FAILED: ' + ', '.join(failed) if failed else 'all green'}", flush=True)
    return 1 if failed else 0


def run_script(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs a script of tests inside the environment, with the requirements of the checkout it names."""
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--comfyui", type=Path)
    checkout = named.parse_known_args(arguments)[0].comfyui
    python = prepare(options, [checkout.resolve()] if checkout and (checkout / "nodes.py").is_file() else [])
    return run(python, str(ROOT / "tests" / SCRIPTS[options.command]), *arguments)


def find_checkouts() -> list[Path]:
    """ComfyUI checkouts named by COMFYUI_PATH, else ~/ComfyUI when it exists."""
    value = os.environ.get("COMFYUI_PATH", "")
    if value == "none":
        return []
    named = [Path(entry).expanduser() for entry in value.split(os.pathsep) if entry]
    wrong = [str(path) for path in named if not (path / "nodes.py").is_file()]
    if wrong:
        sys.exit(f"COMFYUI_PATH names {', '.join(wrong)}, where there is no nodes.py; correct it, or set it to none")
    return [path.resolve() for path in named or [Path.home() / "ComfyUI"] if (path / "nodes.py").is_file()]


def prepare(options: argparse.Namespace, checkouts: Sequence[Path]) -> Path:
    """The interpreter to run with; makes the environment, and installs when a requirement file has changed."""
    if options.python:
        return options.python
    python = options.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"Making {options.venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(options.venv)], check=True)
    text = DEV_REQUIREMENTS.read_text(encoding="utf-8")
    install_once(python, "dev", text, ["-r", str(DEV_REQUIREMENTS)])
    if checkouts:
        wanted = host_requirements(checkouts[0])
        install_once(python, "torchvision", text + TORCHVISION, ["--no-deps", TORCHVISION])
        install_once(python, "host", text + "\n".join(wanted), ["-c", str(constraints(options.venv, text)), *wanted])
    return python


def host_requirements(checkout: Path) -> list[str]:
    """ComfyUI's requirements without torch and its companions, and `requests`, which some versions forget."""
    lines = (checkout / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    return [line for line in wanted if line and re.split(r"[^\w-]", line)[0] not in NOT_FROM_HOST] + ["requests"]


def constraints(venv: Path, requirements: str) -> Path:
    """A pip constraint file with the pinned torch, so that nothing of ComfyUI's exchanges it."""
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
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pip_arguments], check=True)
    stamp.write_text(digest)


def run(python: Path, *arguments: str, env: dict[str, str] | None = None) -> int:
    """Runs the interpreter in the repository root; returns its exit status."""
    print(f"$ {' '.join(arguments)}", flush=True)
    return subprocess.run([str(python), *arguments], cwd=ROOT, env={**os.environ, **(env or {})}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
