"""The exact pip command for this interpreter and platform: portable ComfyUI has a Python of its own."""

from __future__ import annotations

import platform
import shlex
import sys


def onnxruntime_package(system: str = "", machine: str = "") -> str:
    """The onnxruntime build for a platform (default: this one): the GPU build where wheels of it exist."""
    system, machine = system or platform.system(), (machine or platform.machine()).lower()
    has_gpu_wheels = system in ("Linux", "Windows") and machine in ("x86_64", "amd64")
    return "onnxruntime-gpu" if has_gpu_wheels else "onnxruntime"


def pip_install(*packages: str, upgrade: bool = False) -> str:
    """A command line that installs packages into the Python that runs this."""
    return _pip("install", *(["-U"] if upgrade else []), *packages)


def pip_replace(remove: list[str], wanted: str) -> str:
    """A command line that removes packages and installs one again, for builds that overwrite each other."""
    return f"{_pip('uninstall', '-y', *remove)} && {_pip('install', wanted)}"


def _pip(*arguments: str) -> str:
    # A Windows path is quoted for cmd, which knows no single quotes.
    windows = platform.system() == "Windows"
    python = f'"{sys.executable}"' if windows else shlex.quote(sys.executable or "python")
    return " ".join([python, "-m", "pip", *arguments])
