"""The same PuLID file gives the same picture through our node as through PuLID_ComfyUI and PuLID's own encoder."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import peer_ours
import peer_packs
import pulid_files
import pytest
import torch
from fusion_lab import FusionLab, relative
from torch import Tensor


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sdxl_tiny")


def _encoder(tensors: dict[str, Tensor]) -> torch.nn.Module:
    file = peer_packs.peer_folder("PuLID") / "pulid" / "encoders_transformer.py"
    spec = importlib.util.spec_from_file_location("official_pulid_encoder", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.IDFormer().eval()
    network.load_state_dict(
        {k.removeprefix("image_proj."): v for k, v in tensors.items() if k.startswith("image_proj")}
    )
    return network


@torch.no_grad()
def _their_tokens(network: torch.nn.Module, numbers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    photos = [pulid_files.seen(number) for number in numbers]
    conditions = [torch.cat([face, eva / eva.norm(2, 1, True)], -1) for face, eva, _ in photos]
    levels = [torch.cat([photo[2][i] for photo in photos], 1) for i in range(5)]
    nothing = [torch.zeros_like(level) for level in photos[0][2]]
    return network(torch.stack(conditions, 1), levels), network(torch.zeros_like(conditions[0]), nothing)


def _theirs(lab: FusionLab, tensors: dict[str, Tensor], tokens: tuple[Tensor, Tensor], zeros: int, **how: bool) -> Any:
    peer = sys.modules[f"{peer_packs.load_peer(lab.pack.host, 'PuLID_ComfyUI').__name__}.pulid"]
    layers = {k.removeprefix("ip_adapter."): v for k, v in tensors.items() if k.startswith("ip_adapter.")}
    cond, uncond = (torch.nn.functional.pad(one, (0, 0, 0, zeros)) for one in tokens)
    given = {
        "pulid": SimpleNamespace(ip_layers=peer.To_KV(layers)), "weight": 0.8, "cond": cond, "uncond": uncond,
        "sigma_start": 1e9, "sigma_end": 0.0, "mask": None, **{"ortho": False, "ortho_v2": False, **how},
    }  # fmt: skip
    model = lab.model.clone()
    order = lab.pack.submodule("attention.community.layers").processor_order(lab.sites)
    for i, site in enumerate(order):
        peer.set_model_patch_replace(model, {**given, "module_key": str(2 * i + 1)}, site.key)
    return model


@pytest.mark.parametrize("numbers", [(1,), (1, 2, 3)], ids=["one photo", "three photos"])
@pytest.mark.parametrize(("method", "zeros", "how"), [
    ("neutral", 0, {}), ("fidelity", 8, {"ortho_v2": True}), ("style", 16, {"ortho": True}),
])  # fmt: skip
def test_the_same_file_gives_the_same_picture(
    lab: FusionLab, monkeypatch: pytest.MonkeyPatch, method: str, zeros: int, how: dict[str, bool], numbers: Any
) -> None:
    pulid_files.without_tower(lab.pack, monkeypatch)
    entry, tensors = pulid_files.write_pulid(lab.pack, lab.sites, depth=10)
    options = peer_ours.run_node(lab.pack.nodes["FusedIDCommunityOptions"], pulid_method=method)[0]
    identity = pulid_files.person(lab.pack, *numbers)
    ours, _ = lab.patch(adapter=entry, vae=None, identity=identity, strength=0.8, community=options)
    other = _theirs(lab, tensors, _their_tokens(_encoder(tensors), numbers), zeros, **how)
    plain, mine, wanted = (lab.call(model) for model in (lab.model, ours, other))
    assert relative(wanted, plain) > 0.01
    assert relative(mine - plain, wanted - plain) < 1e-3
