"""Runs the tests that need no training with the oldest libraries pyproject.toml allows, beside the oldest ComfyUI.

    python3.10 tests/oldest.py --comfyui PATH [--venv FOLDER] [pytest arguments]

Makes an environment of its own (default: .venv-oldest) and installs requirements-oldest.txt and the checkout's
requirements into it; `pip check` must find nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "requirements-oldest.txt"
COMPANIONS = ("torchvision==0.19.0", "torchaudio==2.4.0")  # the releases made for torch 2.4.0
TESTS = (
    "tests/attention_tests", "tests/faces_tests", "tests/robustness", "tests/host/test_patch_promises.py",
    "tests/host/test_patch_bad_input.py", "tests/test_guidance.py", "tests/test_guidance_file.py",
    "tests/test_guidance_routing.py", "tests/test_community_recognise.py", "tests/test_community_formula.py",
)  # fmt: skip
LEFT_OUT = (
    # torch 2.4's own CPU kernel rounds a softmax in half precision once more.
    "tests/attention_tests/test_fusion_formula.py::test_terms_cost_half_precision_nothing",
    # diffusers is no part of this set.
    "tests/attention_tests/test_sites.py::test_names_are_the_diffusers_module_names_and_back",
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status of pip check or pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-oldest")
    options, rest = parser.parse_known_args(argv)
    if sys.version_info[:2] != (3, 10):
        parser.error(f"this is Python {sys.version.split()[0]}; the oldest libraries have wheels for 3.10")
    python = options.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(options.venv)], check=True)
    host = options.comfyui.resolve() / "requirements.txt"
    wanted = ["-c", str(LIST), "-r", str(LIST), *COMPANIONS, "-r", str(host), "requests"]
    subprocess.run([str(python), "-m", "pip", "install", "-qq", *wanted], check=True)
    if code := subprocess.run([str(python), "-m", "pip", "check"]).returncode:
        return code
    left_out = [word for test in LEFT_OUT for word in ("--deselect", test)]
    command = [str(python), "-m", "pytest", *left_out, *(rest or TESTS)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(host.parent)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
