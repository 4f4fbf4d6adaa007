"""Recorded attention in the real host: the formula's own weights, the same picture, nothing when nobody listens."""

from __future__ import annotations

import math
from typing import Any

import fusion_lab
import numpy as np
import peer_ours
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from fusion_lab import LATENT, FusionLab, halves
from torch import Tensor

from attention.fusion import length_term
from attention.grid import grid_at_level

MODES: dict[str, dict[str, Any]] = {
    "fused": {},
    "decoupled": {"combine": "decoupled"},
    "value strength 0": {"value_strength": 0.0},
    "training-free": {"adapter": "training-free", "reference_size": 64},
    "training-free with AdaIN": {"adapter": "training-free", "reference_size": 64, "adain": True},
    "both prompts": {"apply_to": "both"},
}


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sd15_small")


def recorded(lab: FusionLab, model: Any, **window: float) -> tuple[Any, Any]:
    given = {"model": model, "start_percent": 0.0, "end_percent": 1.0, **window}
    return peer_ours.run_node(lab.pack.nodes["FusedIDRecordAttention"], **given)


def mapped(lab: FusionLab, recording: Any, image: Tensor, identity: int = 0, opacity: float = 0.7) -> Any:
    module = lab.pack.submodule("nodes.attention_map")
    return module.attention_map(recording, image, identity, opacity)


def people(recording: Any) -> Tensor:
    """`[I, B, h, w]`."""
    return torch.stack([share for _, share in recording.people()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("routed", [False, True], ids=["one person", "two people"])
def test_the_picture_is_the_same_bit_for_bit(lab, mode, routed):
    who = {"routed": lab.routed([lab.identity(1), lab.identity(2)], halves(), background="none")} if routed else {}
    patched, _ = lab.patch(**MODES[mode], **who)
    model, recording = recorded(lab, patched)
    assert torch.equal(lab.sample(model), lab.sample(patched))
    shares = people(recording)
    assert shares.shape == (2 if routed else 1, 1, *LATENT)
    assert float(shares.min()) >= 0 and 0.001 < float(shares.max()) <= 1


def test_shares_are_the_formulas_weights_over_layers_and_steps(lab):
    """METHOD 1.1's softmax written out for every layer of every call, from the pixels of the crop on."""
    person = lab.identity(3, weights=(1.0, 0.5))
    patched, _ = lab.patch(identity=person, strength=2.0, key_strength=0.8, attention_scale=1.2)
    model, recording = recorded(lab, patched)
    lab.sample(model)
    features, wanted = fusion_lab.features_by_hand(lab, person), []
    for site in lab.sites:
        trained = math.prod(grid_at_level((8, 8), site.level))
        for call in lab.calls_at(patched, site):
            rows = call.options["cond_or_uncond"].index(0)
            keys, terms = [call.k[rows]], [torch.zeros(call.k.shape[1])]
            for reference, found in zip(person.references, features):
                key = 0.8 * found[site.path][0][0]
                term = length_term("balanced", num_tokens=len(key), num_references=2, num_trained=trained)
                keys.append(key)
                weight = reference.weight / 0.75  # of mean 1
                terms.append(torch.full((len(key),), math.log(2.0 * weight) + term))
            q, k = (rearrange(t, "n (h d) -> h n d", h=site.heads) for t in (call.q[rows], torch.cat(keys)))
            weights = torch.softmax(torch.cat(terms) + 1.2 * q @ k.mT / math.sqrt(q.shape[-1]), -1).mean(0)
            share = weights[:, call.k.shape[1] :].sum(-1).view(1, 1, *fusion_lab.grid_of(call))
            wanted.append(F.interpolate(share, size=LATENT, mode="nearest-exact"))
    torch.testing.assert_close(people(recording), torch.stack(wanted).mean(0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["fused", "decoupled", "training-free"])
def test_in_the_region_of_another_person_the_share_is_exactly_zero(lab, mode):
    routed = lab.routed([lab.identity(1), lab.identity(2)], halves(), background="none")
    model, recording = recorded(lab, lab.patch(routed=routed, **MODES[mode])[0])
    lab.sample(model)
    left, right = people(recording)[:, 0]
    middle = LATENT[1] // 2
    assert not left[:, middle:].any() and not right[:, :middle].any()
    assert left[:, :middle].min() > 0 and right[:, middle:].min() > 0


def test_every_run_starts_anew_and_every_picture_of_a_batch_has_its_map(lab):
    model, recording = recorded(lab, lab.patch()[0])
    lab.sample(model)
    alone = people(recording)
    lab.sample(model, latent=torch.zeros(2, 4, *LATENT))
    both = people(recording)
    assert both.shape[1] == 2 and not torch.equal(both[:, 0], both[:, 1])
    lab.sample(model)
    assert torch.equal(people(recording), alone)


def test_only_the_window_is_recorded(lab):
    patched, _ = lab.patch(end_percent=0.5)
    late, recording = recorded(lab, patched, start_percent=0.6)
    lab.sample(late)
    with pytest.raises(ValueError, match="the recording is empty"):
        recording.people()
    early, first = recorded(lab, patched, end_percent=0.2)
    all_steps, everything = recorded(lab, early)
    lab.sample(all_steps)
    assert not torch.equal(people(first), people(everything))


def test_areas_are_put_in_their_place(lab):
    """A prompt that shows the right half is the only one: the left half was never looked at."""
    import nodes

    plain = lab.positive
    model, recording = recorded(lab, lab.patch()[0])
    (area,) = nodes.ConditioningSetArea().append(plain, 32, 64, 32, 0, 1.0)
    lab.sample(model, positive=area)
    (share,) = people(recording)[:, 0]
    assert not share[:, :4].any() and share[:, 4:].min() > 0


def test_nobody_listening_costs_no_attention(lab, monkeypatch):
    module = lab.pack.submodule("nodes.host.layer_call")
    calls: list[int] = []
    original = module.kernel_attention

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(module, "kernel_attention", counted)
    patched, _ = lab.patch()
    lab.sample(patched)
    without = len(calls)
    lab.sample(recorded(lab, patched)[0])
    assert len(calls) - without > without
    calls.clear()
    lab.sample(patched)
    assert len(calls) == without


def test_record_before_the_patch_works_as_well(lab):
    model, recording = recorded(lab, lab.model)
    lab.sample(lab.patch(model=model)[0])
    assert people(recording).max() > 0


def test_overlay_mask_and_report(lab):
    routed = lab.routed([lab.identity(1), lab.identity(2)], halves(), background="none")
    model, recording = recorded(lab, lab.patch(routed=routed)[0])
    lab.sample(model)
    image = torch.full((1, 64, 64, 3), 0.5)
    overlay, shares, report = mapped(lab, recording, image)
    assert overlay.shape[2] == 512 and overlay.shape[1] > 512, "small pictures are enlarged, the legend is below"
    assert shares.shape == (1, 64, 64) and 0 < float(shares.max()) < 1
    assert [line.split(":")[1].strip() for line in report.splitlines()] == ["1 person 1", "2 person 2"]
    left, right = overlay[0, 100:400, 40:200].mean((0, 1)), overlay[0, 100:400, 312:480].mean((0, 1))
    assert left[0] > left[2] + 0.1 and right[2] > right[0] + 0.1, "red on the left, blue on the right"
    one, only, _ = mapped(lab, recording, image, identity=2)
    assert one.shape[1] < overlay.shape[1], "one line of legend"
    assert float(only[0, :, :24].max()) == 0 and float(only[0, :, 40:].min()) > 0
    plain, _, _ = mapped(lab, recording, image, opacity=0.0)
    assert np.abs(plain[0, :512].numpy() - 0.5).max() < 0.01


@pytest.mark.parametrize(
    ("shape", "identity", "message"),
    [
        ((2, 64, 64, 3), 0, "got 2 pictures, recorded were 1"),
        ((1, 64, 128, 3), 0, "the picture is 128 x 64, the recorded latent 8 x 8"),
        ((1, 64, 64, 3), 2, "identity is 2, recorded were 1"),
    ],
)
def test_what_does_not_fit_is_said(lab, shape, identity, message):
    model, recording = recorded(lab, lab.patch()[0])
    lab.sample(model)
    with pytest.raises(ValueError, match=f"^FusedIDAttentionMap: {message}"):
        lab.pack.nodes["FusedIDAttentionMap"].execute(recording, torch.zeros(shape), identity, 0.5)


@pytest.mark.parametrize("combine", ["decoupled", "fused"])
def test_a_community_file_is_recorded_as_well(lab, pack, small_models, combine):
    """A FaceID file has keys of its own for "no face", which belong to the negative prompt and are nobody's share."""
    scene = peer_ours.make_scene(pack, small_models, "sd15_small")
    patched = scene.patched(scene.model, combine=combine)
    model, recording = recorded(lab, patched)
    prompts = {"positive": scene.positive, "negative": scene.negative}
    assert torch.equal(lab.sample(model, **prompts), lab.sample(patched, **prompts))
    (share,) = people(recording)[:, 0]
    assert float(share.min()) > 0 and float(share.max()) < 1
