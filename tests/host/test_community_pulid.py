"""PuLID through FusedIDAttentionPatch: every layer computes the method's formula, with one set of tokens per person."""

from __future__ import annotations

from typing import Any

import fusion_lab
import peer_ours
import pulid_files
import pytest
import torch
from fusion_lab import FusionLab, largest, relative

from attention.fusion import FaceKeys
from attention.naive import naive_decoupled_attention

METHODS = {
    "fidelity": (8, "v2 as PuLID_ComfyUI"),
    "style": (16, "v1"),
    "neutral": (0, "off"),
    "official v1.1": (20, "v2"),
}


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sdxl_tiny")


@pytest.fixture
def entry(lab: FusionLab, monkeypatch: pytest.MonkeyPatch) -> str:
    pulid_files.without_tower(lab.pack, monkeypatch)
    return pulid_files.write_pulid(lab.pack, lab.sites)[0]


def options(lab: FusionLab, **values: Any) -> Any:
    return peer_ours.run_node(lab.pack.nodes["FusedIDCommunityOptions"], **values)[0]


def tokens_of(lab: FusionLab, entry: str, identity: Any) -> Any:
    adapter = lab.pack.submodule("nodes.community_files").load_community_choice(entry, "as recognised")
    return lab.pack.submodule("nodes.community_source").identity_tokens(adapter, identity)[0]


def check_layers(lab: FusionLab, model: Any, tokens: Any, zeros: int, orthogonal: str, strength: float) -> None:
    """Some layers of a patched MODEL against the naive formula, in the positive and in the negative row."""
    adapter = lab.pack.submodule("attention.community.layers")
    numbers = {site.path: 2 * i + 1 for i, site in enumerate(adapter.processor_order(lab.sites))}
    weights = pulid_files.write_pulid(lab.pack, lab.sites)[1]
    for site in lab.sites[:: max(1, len(lab.sites) // 4)]:
        (call,) = lab.calls_at(model, site, steps=1)
        assert call.options["cond_or_uncond"] == [1, 0]
        for row, one in ((0, tokens.negative), (1, tokens.positive)):
            padded = torch.nn.functional.pad(one, (0, 0, 0, zeros))
            key, value = (padded @ weights[f"ip_adapter.{numbers[site.path]}.to_{kind}_ip.weight"].T for kind in "kv")
            q, k, v = (tensor[row : row + 1] for tensor in (call.q, call.k, call.v))
            text = naive_decoupled_attention(q, k, v, [FaceKeys(key, 0 * value)], heads=site.heads)
            whole = naive_decoupled_attention(
                q, k, v, [FaceKeys(key, strength * value)], heads=site.heads, orthogonal=orthogonal
            )
            assert relative(call.out[row : row + 1] - text, whole - text) < 1e-3, (site.path, row)


@pytest.mark.parametrize("name", METHODS)
def test_every_layer_computes_the_method(lab: FusionLab, entry: str, name: str) -> None:
    identity, (zeros, orthogonal) = pulid_files.person(lab.pack, 1, 2), METHODS[name]
    model, report = lab.patch(
        adapter=entry, vae=None, identity=identity, strength=0.7, community=options(lab, pulid_method=name)
    )
    assert report.startswith(f"{len(lab.sites)} of {len(lab.sites)} layers, 2 references")
    assert f"PuLID method {name} ({zeros} zero tokens, orthogonal {orthogonal})" in report
    assert "PuLID v1.1: 2 references through one encoder call" in report
    check_layers(lab, model, tokens_of(lab, entry, identity), zeros, orthogonal, 0.7)


def test_without_options_it_is_fidelity(lab: FusionLab, entry: str) -> None:
    given = {"adapter": entry, "vae": None, "identity": pulid_files.person(lab.pack, 1)}
    bare, report = lab.patch(**given)
    named, _ = lab.patch(community=options(lab, pulid_method="fidelity"), **given)
    assert "PuLID method fidelity (8 zero tokens" in report
    assert torch.equal(lab.sample(bare), lab.sample(named))


def test_zero_tokens_and_projection_can_be_chosen_apart(lab: FusionLab, entry: str) -> None:
    identity = pulid_files.person(lab.pack, 1)
    chosen = options(lab, pulid_method="style", zero_tokens=3, orthogonal="v2")
    model, report = lab.patch(adapter=entry, vae=None, identity=identity, community=chosen)
    assert "PuLID method style, changed (3 zero tokens, orthogonal v2)" in report
    check_layers(lab, model, tokens_of(lab, entry, identity), 3, "v2", 1.0)


def test_a_persons_region_does_not_know_the_other(lab: FusionLab, entry: str) -> None:
    masks, calls = fusion_lab.halves(), []
    for other in (5, 6):
        people = [pulid_files.person(lab.pack, 3), pulid_files.person(lab.pack, other)]
        patched, _ = lab.patch(adapter=entry, vae=None, routed=lab.routed(people, masks))
        calls.append(lab.calls_at(patched, lab.sites[0], steps=1)[0])
    left, right = (fusion_lab.tokens(mask, fusion_lab.grid_of(calls[0])) for mask in masks)
    assert largest(calls[0].out[1, left] - calls[1].out[1, left]) == 0.0
    assert largest(calls[0].out[1, right] - calls[1].out[1, right]) > 1e-3


def test_the_order_of_references_does_not_matter(lab: FusionLab, entry: str) -> None:
    weights = (1.0, 0.4, 0.7)
    forth = lab.patch(adapter=entry, vae=None, identity=pulid_files.person(lab.pack, 1, 2, 3, weights=weights))
    back = lab.patch(adapter=entry, vae=None, identity=pulid_files.person(lab.pack, 3, 2, 1, weights=weights[::-1]))
    assert "by their weights (the original knows no weights)" in forth[1]
    assert relative(lab.sample(back[0]), lab.sample(forth[0])) < 1e-4


def test_a_reference_of_weight_0_is_left_out(lab: FusionLab, entry: str) -> None:
    both, report = lab.patch(adapter=entry, vae=None, identity=pulid_files.person(lab.pack, 1, 2, weights=(1.0, 0.0)))
    alone, _ = lab.patch(adapter=entry, vae=None, identity=pulid_files.person(lab.pack, 1))
    assert "layers, 1 reference," in report
    assert torch.equal(lab.sample(both), lab.sample(alone))


def test_one_softmax_has_no_projection_and_says_so(lab: FusionLab, entry: str) -> None:
    _, report = lab.patch(adapter=entry, vae=None, identity=pulid_files.person(lab.pack, 1), combine="fused")
    assert "orthogonal has no effect" in report


def test_options_that_change_nothing_say_so(lab: FusionLab, entry: str) -> None:
    _, report = lab.patch(community=options(lab, pulid_method="style"))
    assert "community: has no effect" in report
