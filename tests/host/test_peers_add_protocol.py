"""Promise 8: packs that add to cross-attention through IPAdapter_plus' `add` protocol, before us and after us.

In the first layer, where every variant of the model sees the same input, contributions must add up exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import peer_ours
import peer_packs
import peer_standins
import pytest
import torch
from fusion_lab import relative
from torch import Tensor

LAYOUT = "sd15_tiny"
SIZE = 16
TOLERANCE = 1e-4
Install = Callable[[Any], Any]
STAND_IN, IPADAPTER, INSTANTID, PULID = "stand-in", "ComfyUI_IPAdapter_plus", "ComfyUI_InstantID", "PuLID_ComfyUI"


def _options(number: int, context: int, width: int) -> dict[str, Any]:
    return {
        "module_key": str(number),
        "weight": 0.8,
        "cond": peer_packs.peer_tokens(1, context),
        "uncond": peer_packs.peer_tokens(2, context),
        "mask": None,
        "sigma_start": 1e9,
        "sigma_end": 0.0,
    }


def _peer_install(host: Any, peer: str, keys: list[tuple[Any, ...]]) -> Install:
    if peer == STAND_IN:
        return lambda model: peer_standins.add_branch(model, keys)
    name = peer_packs.load_peer(host, peer).__name__
    layers = peer_packs.PeerLayers(320, 768, range(1, 2 * len(keys), 2))
    file, function, holder = {
        IPADAPTER: ("IPAdapterPlus", "set_model_patch_replace", "ipadapter"),
        INSTANTID: ("InstantID", "_set_model_patch_replace", "ipadapter"),
        PULID: ("pulid", "set_model_patch_replace", "pulid"),
    }[peer]
    patch = getattr(sys.modules[f"{name}.{file}"], function)

    def install(model: Any) -> Any:
        patched = model.clone()
        for i, key in enumerate(keys):
            # IPAdapter_plus names SD1.5 layers by two parts, the others by three.
            place = key[:2] if peer == IPADAPTER else key
            patch(patched, {**_options(2 * i + 1, 768, 320), holder: layers}, place)
        return patched

    return install


@pytest.fixture(scope="module")
def scene(pack: Any, small_models: Any) -> peer_ours.Scene:
    return peer_ours.make_scene(pack, small_models, LAYOUT)


@pytest.fixture(scope="module")
def captured(scene: peer_ours.Scene) -> Callable[[Any], Tensor]:
    return lambda model: peer_standins.capture_first_layer(
        model, scene.keys[0], scene.positive, scene.negative, size=SIZE
    )


@pytest.fixture(scope="module")
def alone(scene: peer_ours.Scene, captured: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """(plain, ours)."""
    plain, mine = captured(scene.model), captured(scene.patched(scene.model))
    assert float((mine - plain).abs().max()) > 0.01
    return plain, mine


@pytest.mark.parametrize("combine", ["fused", "decoupled"])
@pytest.mark.parametrize("peer", [STAND_IN, IPADAPTER, INSTANTID, PULID])
def test_contributions_add_up_in_both_orders(
    pack: Any,
    scene: peer_ours.Scene,
    captured: Callable[[Any], Tensor],
    alone: tuple[Tensor, Tensor],
    peer: str,
    combine: str,
) -> None:
    install = _peer_install(pack.host, peer, scene.keys)
    plain, mine = alone[0], captured(scene.patched(scene.model, combine=combine))
    theirs = captured(install(scene.model))
    assert float((theirs - plain).abs().max()) > 0.01
    expected = theirs + mine - plain
    theirs_first = captured(scene.patched(install(scene.model), combine=combine))
    torch.testing.assert_close(theirs_first, expected, atol=TOLERANCE, rtol=TOLERANCE)
    ours_first = captured(install(scene.patched(scene.model, combine=combine)))
    torch.testing.assert_close(ours_first, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_two_of_them_and_us_add_up(
    pack: Any, scene: peer_ours.Scene, captured: Callable[[Any], Tensor], alone: tuple[Tensor, Tensor]
) -> None:
    plain, mine = alone
    install = _peer_install(pack.host, STAND_IN, scene.keys)
    theirs = captured(install(scene.model))
    around = captured(install(scene.patched(install(scene.model))))
    torch.testing.assert_close(around, mine + 2 * (theirs - plain), atol=TOLERANCE, rtol=TOLERANCE)


def test_whole_runs_do_not_depend_on_the_order(pack: Any, scene: peer_ours.Scene) -> None:
    install = _peer_install(pack.host, STAND_IN, scene.keys)
    runs = [
        peer_standins.sample(model, scene.positive, scene.negative, size=SIZE)
        for model in (scene.patched(install(scene.model)), install(scene.patched(scene.model)))
    ]
    assert relative(*runs) < 1e-4


def test_their_model_is_as_it_was_after_ours_was_made_from_it(
    pack: Any, scene: peer_ours.Scene, captured: Callable[[Any], Tensor]
) -> None:
    theirs = _peer_install(pack.host, STAND_IN, scene.keys)(scene.model)
    before = captured(theirs)
    captured(scene.patched(theirs))
    assert torch.equal(captured(theirs), before)
    mine = scene.patched(scene.model)
    before = captured(mine)
    captured(_peer_install(pack.host, STAND_IN, scene.keys)(mine))
    assert torch.equal(captured(mine), before)
