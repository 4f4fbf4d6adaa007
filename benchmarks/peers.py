"""IPAdapter_plus' FaceID on the same model, when FUSEDID_PEERS (default ~/comfyui-peers) has the pack.

Its weights are random. Its face model is replaced by a fixed answer: only the sampling step is timed.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from .scene import Scene

PACK = "ComfyUI_IPAdapter_plus"
KEYPOINTS = np.array([[85, 90], [140, 90], [112, 120], [90, 150], [135, 150]], dtype=np.float32)
CLIP = {
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "image_size": 224,
    "intermediate_size": 128,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "projection_dim": 48,
}


def missing(scene: Scene) -> str | None:
    """Why the row cannot be measured here, or None."""
    import importlib.util

    if not (_folder() / PACK).is_dir():
        return f"no {PACK} in FUSEDID_PEERS"
    if importlib.util.find_spec("insightface") is None:
        return f"{PACK} needs the package insightface"
    if _layers(scene) is None:
        return f"{PACK} knows only the layer numbers of SD1.5 and SDXL"
    return None


def faceid(scene: Scene) -> Any:
    """The MODEL that the node IPAdapterFaceID makes."""
    import community_files as files

    host = scene.pack.host
    if "IPAdapterFaceID" not in host.nodes.NODE_CLASS_MAPPINGS:
        loaded = asyncio.run(host.nodes.load_custom_node(str(_folder() / PACK)))
        if not loaded:
            raise ValueError(f"ComfyUI {host.version} cannot load {PACK}; its log says why")
    folder = host.base / "models" / "ipadapter"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"bench_{scene.layout}.safetensors"
    base = scene.layout.split("_")[0]
    shapes = files.file_shapes("faceid", base, widths=_layers(scene), rank=4)
    save_file(files.random_tensors(shapes, dtype=torch.float16), folder / name)
    (adapter,) = host.node("IPAdapterModelLoader")().load_ipadapter_model(name)
    return host.node("IPAdapterFaceID")().apply_ipadapter(
        scene.model, adapter, image=torch.rand(1, 224, 224, 3), clip_vision=_clip_vision(host.base),
        insightface=_FaceModel(), weight=1.0,
    )[0]  # fmt: skip


def _folder() -> Path:
    return Path(os.environ.get("FUSEDID_PEERS", Path.home() / "comfyui-peers"))


def _layers(scene: Scene) -> list[int] | None:
    """Widths in the order of the pack's files: down, up, middle."""
    sites = scene.sites
    if len(sites) not in (16, 70):
        return None
    order = {"input": 0, "output": 1, "middle": 2}
    return [site.channels for site in sorted(sites, key=lambda site: order[site.key[0]])]


class _FaceModel:
    """Answers as insightface's FaceAnalysis does, always the same."""

    det_model = SimpleNamespace(input_size=None)

    def get(self, _: Any) -> list[Any]:
        return [SimpleNamespace(normed_embedding=np.ones(512, np.float32) / 512**0.5, kps=KEYPOINTS)]


def _clip_vision(base: Path) -> Any:
    """A CLIP vision model of three small layers; FaceID looks at its answer for nothing."""
    import community_files as files
    from comfy.clip_vision import ClipVisionModel

    path = base / "clip_vision.json"
    path.write_text(json.dumps(CLIP))
    model = ClipVisionModel(str(path))
    model.load_sd(files.random_tensors({name: tuple(weight.shape) for name, weight in model.get_sd().items()}))
    return model
