"""Promises 8 and 9: attention overrides, FreeU, perturbed attention and context windows beside us, in both orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peer_ours
import peer_packs
import peer_standins
import pytest
from fusion_lab import relative
from torch import Tensor

SIZE = 16
ROUNDING = 1e-4  # of the whole picture's size: sampling enlarges what the last bit differs by


@pytest.fixture(scope="module")
def scene(pack: Any, small_models: Any) -> peer_ours.Scene:
    return peer_ours.make_scene(pack, small_models, "sd15_small")


def _run(scene: peer_ours.Scene, model: Any, **options: Any) -> Tensor:
    return peer_standins.sample(model, scene.positive, scene.negative, size=SIZE, **options)


@pytest.mark.parametrize("ours_first", [False, True])
def test_an_attention_override_sees_our_calls_and_changes_nothing(scene: peer_ours.Scene, ours_first: bool) -> None:
    mine, seen = scene.patched(scene.model), []
    both = (
        peer_standins.override_attention(mine, seen)
        if ours_first
        else scene.patched(peer_standins.override_attention(scene.model, seen))
    )
    expected = _run(scene, mine)
    seen.clear()
    assert relative(_run(scene, both), expected) < ROUNDING
    theirs: list[str] = []
    _run(scene, peer_standins.override_attention(scene.model, theirs))
    assert len(seen) >= len(theirs) > 0


def _freeu(host: Any, model: Any) -> Any:
    node = host.node("FreeU_V2")
    if hasattr(node, "execute"):
        return node.execute(model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2).args[0]
    return node().patch(model, 1.3, 1.4, 0.9, 0.2)[0]


def _pag(host: Any, model: Any) -> Any:
    node = host.node("PerturbedAttentionGuidance")
    return node.execute(model=model, scale=2.0).args[0] if hasattr(node, "execute") else node().patch(model, 2.0)[0]


def _sag(host: Any, model: Any) -> Any:
    node = host.node("SelfAttentionGuidance")
    if hasattr(node, "execute"):
        return node.execute(model=model, scale=0.5, blur_sigma=2.0).args[0]
    return node().patch(model, 0.5, 2.0)[0]


def _perturbed(host: Any, model: Any) -> Any:
    peer_packs.load_peer(host, "sd-perturbed-attention")
    node = host.node("PerturbedAttention")
    given = {"model": model, "scale": 2.0, "adaptive_scale": 0.0, "unet_block": "middle", "unet_block_id": 0}
    return node.execute(**given).args[0] if hasattr(node, "execute") else node().patch(**given)[0]


@pytest.fixture(scope="module")
def host_extras(comfyui: Any) -> None:
    """The host's own extra nodes, which its server would load at the start."""
    import asyncio

    asyncio.run(comfyui.nodes.init_builtin_extra_nodes())


@pytest.mark.parametrize("install", [_freeu, _pag, _sag, _perturbed], ids=["FreeU", "PAG", "SAG", "sd-perturbed"])
def test_model_patches_beside_us_do_not_depend_on_the_order(
    pack: Any, scene: peer_ours.Scene, host_extras: None, install: Callable[[Any, Any], Any]
) -> None:
    theirs = _run(scene, install(pack.host, scene.model))
    before = _run(scene, scene.patched(install(pack.host, scene.model)))
    after = _run(scene, install(pack.host, scene.patched(scene.model)))
    assert relative(after, before) < ROUNDING
    assert relative(theirs, before) > 1e-3
    assert relative(_run(scene, scene.patched(scene.model)), before) > 1e-3
