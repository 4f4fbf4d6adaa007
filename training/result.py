"""What an output file says about how it was made."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .base import base_hash
from .checkpoint import TrainState
from .config import TrainConfig
from .source import Source
from .task import RunFacts

_MACHINE_PATH = re.compile(r"^(/|~|\.\.?[/\\]|[A-Za-z]:[/\\]|[a-z0-9]+://)")
LIBRARIES = ("torch", "diffusers", "accelerate", "transformers", "safetensors", "peft")


def versions() -> dict[str, str]:
    """Versions of Python and of every library that takes part."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """The commit this code was run from; empty outside a checkout."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def without_folders(value: Any) -> Any:
    """The value with every absolute path or URL in it cut down to its last part: files are published."""
    if isinstance(value, dict):
        return {name: without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if isinstance(value, str) and _MACHINE_PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def run_facts(config: TrainConfig, state: TrainState, source: Source) -> RunFacts:
    """Everything the file records. The configuration goes in whole, but for the folders of the machine it ran on."""
    shared = without_folders(config.model_dump(mode="json"))
    return RunFacts(
        samples_seen=state.position,
        metadata={
            "fusedid.training_config": json.dumps(shared, sort_keys=True),
            "fusedid.training_config_hash": state.config_hash,
            "fusedid.training_steps": str(state.step),
            "fusedid.data_fingerprint": state.data_fingerprint,
            "fusedid.code_revision": git_revision(),
            "fusedid.versions": json.dumps(state.versions, sort_keys=True),
        },
        base_hash=base_hash(config.model.base),
        encoder=source.encoder,
    )
