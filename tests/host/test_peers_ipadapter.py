"""The same IP-Adapter file gives the same layer output through our node and through IPAdapter_plus' own nodes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import community_files as files
import peer_ours
import peer_packs
import peer_standins
import pytest
import torch
from safetensors.torch import save_file

LAYOUT = "sd15_full"
SIZE = 8
HIDDEN, EMBED = 64, 48
CLIP = {
    "hidden_act": "quick_gelu",
    "hidden_size": HIDDEN,
    "image_size": 224,
    "intermediate_size": 128,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "projection_dim": EMBED,
}


@pytest.fixture(scope="module")
def clip_vision(comfyui: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from comfy.clip_vision import ClipVisionModel

    path = tmp_path_factory.mktemp("clip") / "config.json"
    path.write_text(json.dumps(CLIP))
    model = ClipVisionModel(str(path))
    model.load_sd(files.random_tensors({name: tuple(w.shape) for name, w in model.get_sd().items()}))
    return model


def _write(folder: Path, family: str) -> str:
    shapes = files.file_shapes(family, "sd15", widths=(320,) * 16)
    name, width = {"standard": ("proj.weight", EMBED), "plus": ("proj_in.weight", HIDDEN)}[family]
    shapes[f"image_proj.{name}"] = (shapes[f"image_proj.{name}"][0], width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(files.random_tensors(shapes), folder / f"same_{family}.safetensors")
    return f"same_{family}.safetensors"


@pytest.mark.parametrize("family", ["standard", "plus"])
def test_the_same_file_gives_the_same_layer(pack: Any, small_models: Any, clip_vision: Any, family: str) -> None:
    peer_packs.load_peer(pack.host, "ComfyUI_IPAdapter_plus")
    scene = peer_ours.make_scene(pack, small_models, LAYOUT)
    file = _write(pack.host.base / "models" / "ipadapter", family)
    reference = replace(scene.identity.references[0], crop=_picture())
    identity = pack.submodule("faces.identity").Identity((reference,), scene.identity.encoder)
    (mine,) = peer_ours.run_node(
        pack.nodes["FusedIDAttentionPatch"],
        model=scene.model,
        identity=identity,
        adapter=f"ipadapter/{file}",
        combine="decoupled",
        clip_vision=clip_vision,
    )[:1]
    (loaded,) = pack.host.node("IPAdapterModelLoader")().load_ipadapter_model(file)
    image = torch.from_numpy(_picture()).float()[None] / 255
    theirs = (
        pack.host.node("IPAdapterAdvanced")()
        .apply_ipadapter(
            scene.model, loaded, image=image, weight=1.0, clip_vision=clip_vision, weight_type="linear",
            combine_embeds="concat", embeds_scaling="V only", start_at=0.0, end_at=1.0,
        )[0]
    )  # fmt: skip
    plain, ours, other = (
        peer_standins.capture_first_layer(model, scene.keys[0], scene.positive, scene.negative, SIZE)
        for model in (scene.model, mine, theirs)
    )
    assert float((other - plain).abs().max()) > 0.01
    torch.testing.assert_close(ours[:1], other[:1], atol=1e-4, rtol=1e-4)
    if family == "standard":  # for Plus they show CLIP a black picture in the negative rows, the project a blank one
        torch.testing.assert_close(ours[1:], other[1:], atol=1e-4, rtol=1e-4)


def _picture() -> Any:
    import numpy as np

    return np.random.default_rng(4).integers(0, 255, (224, 224, 3), dtype=np.uint8)
