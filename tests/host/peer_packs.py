"""Real node packs of other people, from the folder FUSEDID_PEERS names (default ~/comfyui-peers). Never part of this
repository: tests that need one skip when it is absent."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PEER_URLS = {
    "ComfyUI_IPAdapter_plus": "https://github.com/cubiq/ComfyUI_IPAdapter_plus",
    "ComfyUI_InstantID": "https://github.com/cubiq/ComfyUI_InstantID",
    "PuLID_ComfyUI": "https://github.com/cubiq/PuLID_ComfyUI",
    "cgem156-ComfyUI": "https://github.com/laksjdjf/cgem156-ComfyUI",
    "ComfyUI-KJNodes": "https://github.com/kijai/ComfyUI-KJNodes",
    "ComfyUI-Advanced-ControlNet": "https://github.com/Kosinkadink/ComfyUI-Advanced-ControlNet",
    "ComfyUI-AnimateDiff-Evolved": "https://github.com/Kosinkadink/ComfyUI-AnimateDiff-Evolved",
    "PuLID": "https://github.com/ToTheBeginning/PuLID",
    "sd-perturbed-attention": "https://github.com/pamparamm/sd-perturbed-attention",
    "ComfyUI_UltimateSDUpscale": "https://github.com/ssitu/ComfyUI_UltimateSDUpscale",
    "ComfyUI-Impact-Pack": "https://github.com/ltdrdata/ComfyUI-Impact-Pack",
    "ComfyUI-ppm": "https://github.com/pamparamm/ComfyUI-ppm",
    "comfyui-prompt-control": "https://github.com/asagi4/comfyui-prompt-control",
    "ComfyUI-ComfyCouple": "https://github.com/Danand/ComfyUI-ComfyCouple",
    "A8R8_ComfyUI_nodes": "https://github.com/ramyma/A8R8_ComfyUI_nodes",
    "ComfyUI_densediffusion": "https://github.com/huchenlei/ComfyUI_densediffusion",
    "ComfyUI-TiledDiffusion": "https://github.com/shiimizu/ComfyUI-TiledDiffusion",
    "Skimmed_CFG": "https://github.com/Extraltodeus/Skimmed_CFG",
    "style_aligned_comfy": "https://github.com/brianfitzgerald/style_aligned_comfy",
}
# PuLID_ComfyUI and Impact Pack import these at their top, and use them only to prepare pictures.
IMAGE_LIBRARIES = (
    "facexlib",
    "facexlib.parsing",
    "facexlib.utils",
    "facexlib.utils.face_restoration_helper",
    "timm",
    "timm.layers",
    "timm.loss",
    "timm.models",
    "timm.models.layers",
    "ftfy",
    "piexif",
    "segment_anything",
)
RENAMED = {"ComfyUI-ppm": (("comfy.ldm.cosmos.predict2", "apply_rotary_pos_emb"),)}
"""Names of the host that a pack imports for other models than ours, gone in some versions."""


def peers_root() -> Path:
    """The folder of checkouts; `pylib` in it holds libraries that they need and nobody else has."""
    return Path(os.environ.get("FUSEDID_PEERS", Path.home() / "comfyui-peers"))


def peer_folder(name: str) -> Path:
    """The checkout of a pack; skips the test when it is not there."""
    root = peers_root()
    if not (root / name).is_dir():
        pytest.skip(f"no {name} in {root}: set FUSEDID_PEERS to a folder with a clone of {PEER_URLS[name]}")
    return root / name


def load_peer(host: Any, name: str) -> types.ModuleType:
    """The pack as the host's own loader makes it; skips when this host or machine cannot load it."""
    folder = peer_folder(name)
    if name == "cgem156-ComfyUI":
        load_couple_node(host)
        return sys.modules["peer_couple"]
    loaded_name = str(folder).replace(".", "_x_")
    if loaded_name not in sys.modules:
        stand_ins = [library for library in IMAGE_LIBRARIES if _stand_in(library)]
        with _lent(name):
            loaded = asyncio.run(host.nodes.load_custom_node(str(folder)))
        # Left behind, they would tell other libraries that they are installed.
        for library in stand_ins:
            sys.modules.pop(library, None)
        if not loaded:
            sys.modules.pop(loaded_name, None)
            pytest.skip(f"ComfyUI {host.version} cannot load {name} here; its log says why")
    return sys.modules[loaded_name]


@contextmanager
def _lent(name: str) -> Iterator[None]:
    """While a pack loads: its libraries, a server without routes, names that this host no longer has, and no sign of
    pytest, under which one registers no nodes."""
    from server import PromptServer

    running = os.environ.pop("PYTEST_CURRENT_TEST", None)
    path, server = list(sys.path), PromptServer.__dict__.get("instance")
    sys.path.append(str(peers_root() / "pylib"))
    PromptServer.instance = server or types.SimpleNamespace(
        **dict.fromkeys(("client_id", "last_node_id", "last_prompt_id", "prompt_queue", "loop")),
        routes=_AnyDecorator(), app=_AnyDecorator(), send_sync=lambda *_, **__: None,
        add_on_prompt_handler=lambda *_: None, on_prompt_handlers=[], supports=[], number=0,
    )  # fmt: skip
    borrowed = []
    for module_name, attribute in RENAMED.get(name, ()):
        module = importlib.import_module(module_name)
        if not hasattr(module, attribute):
            setattr(module, attribute, None)
            borrowed.append((module, attribute))
    try:
        yield
    finally:
        if running is not None:
            os.environ["PYTEST_CURRENT_TEST"] = running
        sys.path[:] = path
        for module, attribute in borrowed:
            delattr(module, attribute)
        if server is None:
            del PromptServer.instance


class _AnyDecorator:
    """An object whose every method decorates nothing."""

    router = types.SimpleNamespace(frozen=True)

    def __getattr__(self, _name: str) -> Any:
        return lambda *_, **__: lambda function: function


class _Empty(types.ModuleType):
    """A module in which every name exists and is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _stand_in(library: str) -> bool:
    try:
        importlib.import_module(library)
    except ImportError:
        sys.modules[library] = _Empty(library)
        return True
    return False


def load_couple_node(host: Any) -> Any:
    """cgem156-ComfyUI's AttentionCouple class. The pack only loads under `custom_nodes`, so its one file is taken."""
    folder = peer_folder("cgem156-ComfyUI")
    root = types.ModuleType("peer_couple")
    root.__path__ = [str(folder)]
    for constant in ("ROOT_NAME", "SYMBOL", "NODE_SURFIX"):
        setattr(root, constant, "")
    sys.modules["peer_couple"] = root
    return importlib.import_module("peer_couple.scripts.attention_couple.node").AttentionCouple


def load_impact(host: Any) -> types.ModuleType:
    """Impact Pack without its second pack, which holds detectors only."""
    folder = peer_folder("ComfyUI-Impact-Pack")
    if str(folder / "modules") not in sys.path:
        sys.path.append(str(folder / "modules"))
    detectors = types.ModuleType("impact.subpack_nodes")
    detectors.NODE_CLASS_MAPPINGS, detectors.NODE_DISPLAY_NAME_MAPPINGS = {}, {}
    sys.modules.setdefault("impact.subpack_nodes", detectors)
    return load_peer(host, "ComfyUI-Impact-Pack")


class PeerLayers:
    """Key and value weights as those packs hold them: `.ip_layers.to_kvs["1_to_k_ip"]`."""

    def __init__(self, width: int, context: int, numbers: range) -> None:
        self.ip_layers = types.SimpleNamespace(to_kvs={})
        for number in numbers:
            for part in "kv":
                layer = torch.nn.Linear(context, width, bias=False)
                generator = torch.Generator().manual_seed(number * 2 + (part == "v"))
                layer.weight.data = torch.randn(width, context, generator=generator) / context**0.5
                self.ip_layers.to_kvs[f"{number}_to_{part}_ip"] = layer.requires_grad_(False)

    def get_multigpu_clone(self, _device: Any) -> PeerLayers:
        return self


def peer_tokens(seed: int, context: int, count: int = 4) -> Tensor:
    """Face tokens `[1, count, context]`."""
    return torch.randn(1, count, context, generator=torch.Generator().manual_seed(seed))
