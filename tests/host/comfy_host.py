"""Imports a ComfyUI checkout in this process, on CPU; whatever it writes goes to a temp folder."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

MODEL_FOLDERS = ("checkpoints", "diffusion_models", "vae", "vae_approx", "text_encoders", "loras", "controlnet")
HOW_TO = "set COMFYUI_PATH to a ComfyUI checkout (or have one in ~/ComfyUI*) to run the host tests"


@dataclass(frozen=True)
class Host:
    """The running host: `nodes` is its nodes.py, `base` the temp folder with models/, input/, output/, user/."""

    path: Path
    version: str
    base: Path
    nodes: ModuleType

    def node(self, node_id: str) -> Any:
        """A class of the host's or a pack's node, by id."""
        return self.nodes.NODE_CLASS_MAPPINGS[node_id]

    def extra(self, name: str) -> ModuleType:
        """A module of `comfy_extras`, for example `nodes_pag`."""
        return importlib.import_module(f"comfy_extras.{name}")


@dataclass(frozen=True)
class Pack:
    """This repository as the host loaded it. `nodes` holds our node classes by id; `host` is the Host."""

    module: ModuleType
    nodes: dict[str, Any]
    host: Host

    def submodule(self, name: str) -> ModuleType:
        """A module of the pack under the host's name for it, e.g. `nodes.patch` or `attention.grid`.

        Its classes are the ones the nodes use; `attention.grid` imported absolutely is a second copy.
        """
        return importlib.import_module(f"{self.module.__name__}.{name}")


def comfyui_version(path: Path) -> str:
    """The version a checkout calls itself, `unknown` before 2025."""
    file = path / "comfyui_version.py"
    found = re.search(r'"([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return found.group(1) if found else "unknown"


def foreign_frontend(path: Path) -> str | None:
    """Which frontend this environment has, where the checkout pins another one; None when they agree."""
    text = (path / "requirements.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^comfyui-frontend-package==(\S+)", text, flags=re.MULTILINE)
    try:
        installed = importlib.metadata.version("comfyui-frontend-package")
    except importlib.metadata.PackageNotFoundError:
        installed = "no version"
    if pinned is None or pinned[1] == installed:
        return None
    return f"it pins frontend {pinned[1]}, here is {installed}"


def make_base(base: Path) -> Path:
    """A base directory as ComfyUI's `--base-directory` wants it."""
    for folder in ("input", "output", "temp", "user", "custom_nodes", *(f"models/{name}" for name in MODEL_FOLDERS)):
        (base / folder).mkdir(parents=True, exist_ok=True)
    return base


def import_host(path: Path, base: Path, *, cpu: bool = True) -> Host:
    """Imports the checkout's `nodes`, by default on CPU. Once per process: the host keeps its state in modules."""
    sys.path.insert(
        0, str(path)
    )  # before the repository root, whose `nodes` folder has the name of the host's nodes.py
    from comfy.cli_args import args

    args.cpu = cpu
    args.base_directory = str(base)
    args.database_url = "sqlite:///:memory:"
    importlib.import_module("utils.extra_config")  # nodes.py puts comfy/ first on sys.path, with another `utils`
    host_nodes = importlib.import_module("nodes")
    assert Path(host_nodes.__file__ or "").resolve() == path / "nodes.py", f"{host_nodes.__file__} is not the host's"
    return Host(path=path, version=comfyui_version(path), base=base, nodes=host_nodes)


def load_pack(host: Host, root: Path) -> Pack:
    """Loads the repository through the host's own loader; its log says why when it refuses."""
    before = set(host.nodes.NODE_CLASS_MAPPINGS)
    loaded = asyncio.run(host.nodes.load_custom_node(str(root)))
    assert loaded, "ComfyUI's load_custom_node refused the pack; the captured log has the traceback"
    ours = set(host.nodes.NODE_CLASS_MAPPINGS) - before
    module = sys.modules[str(root).replace(".", "_x_")]
    return Pack(module=module, nodes={name: host.nodes.NODE_CLASS_MAPPINGS[name] for name in ours}, host=host)
