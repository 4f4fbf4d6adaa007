"""How reference features are kept and how many tokens they have, in the real host: outputs, bytes, passes."""

from __future__ import annotations

from typing import Any

import fusion_lab
import pytest
import torch
from fusion_lab import FusionLab, relative

from attention.cache import MIB

FREE = "training-free"
SIZE = 192  # 24 x 24 tokens at the finest level: enough for merging to begin
FORMS: dict[str, dict[str, Any]] = {
    "fp8": {"cache_precision": "fp8"},
    "ram": {"cache_device": "cpu"},
    "fp8 in ram": {"cache_precision": "fp8", "cache_device": "cpu"},
    "merged": {"reference_tokens": 0.6},
    "all": {"cache_precision": "fp8", "cache_device": "cpu", "reference_tokens": 0.6},
}
ERRORS = {"fp8": 0.01, "ram": 0.0, "fp8 in ram": 0.01, "merged": 0.02, "all": 0.02}
"""Largest change of a prediction, relative to what the face changes in it."""


@pytest.fixture(scope="module")
def labs(pack: Any, small_models: Any) -> Any:
    made: dict[str, FusionLab] = {}

    def lab(layout: str = "sd15_tiny") -> FusionLab:
        if layout not in made:
            made[layout] = FusionLab(pack, small_models, layout, reference_size=SIZE)
        return made[layout]

    return lab


def cache(lab: FusionLab) -> Any:
    return lab.pack.submodule("nodes.reference_cache").CACHE


def lost(lab: FusionLab, given: dict[str, Any], form: dict[str, Any]) -> float:
    """|prediction in this form - prediction| over |prediction - unpatched prediction|."""
    plain, usual, kept = (lab.call(m) for m in (lab.model, lab.patch(**given)[0], lab.patch(**given, **form)[0]))
    return float((kept - usual).norm() / (usual - plain).norm())


def settings(lab: FusionLab, name: str) -> dict[str, Any]:
    """Everything that a form has to go together with."""
    masks = fusion_lab.halves(gap=8)
    return {
        "references": {"identity": lab.identity(3, weights=(1.0, 0.4, 2.0)), "strength": 1.7},
        "decoupled": {"combine": "decoupled"},
        "paper": {"length": "paper", "key_strength": 0.8, "value_strength": 1.2},
        "people": {"routed": lab.routed([lab.identity(3), lab.identity(4)], masks, background="none")},
        "soft people": {"routed": lab.routed([lab.identity(3), lab.identity(4)], masks, feather=6)},
        "both": {"apply_to": "both"},
        "free": {"adapter": FREE, "timestep": "clean", "reference_size": SIZE},
        "free, adain": {"adapter": FREE, "timestep": "clean", "reference_size": SIZE, "adain": True},
    }[name]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_nearly_the_same_prediction(labs, form):
    lab = labs()
    change = lost(lab, {}, FORMS[form])
    assert change <= ERRORS[form]
    assert (change == 0.0) is (form == "ram")


@pytest.mark.parametrize(
    "name", ["references", "decoupled", "paper", "people", "soft people", "both", "free", "free, adain"]
)
def test_all_forms_together_go_with_every_setting(labs, name):
    lab = labs()
    assert 0.0 < lost(lab, settings(lab, name), FORMS["all"]) <= ERRORS["all"]


def test_sdxl_too(labs):
    assert 0.0 < lost(labs("sdxl_tiny"), {}, FORMS["all"]) <= ERRORS["all"]


def test_the_defaults_change_nothing_bit_for_bit(labs):
    """Old workflows have none of the inputs."""
    lab = labs()
    given = {"cache_precision": "model", "cache_device": "model", "reference_tokens": 1.0}
    assert torch.equal(lab.call(lab.patch(**given)[0]), lab.call(lab.patch()[0]))


def test_promise_1_strength_0_and_outside_the_window_are_the_unpatched_model(labs):
    lab = labs()
    wanted = lab.call(lab.model)
    assert torch.equal(lab.call(lab.patch(strength=0.0, **FORMS["all"])[0]), wanted)
    late, _ = lab.patch(start_percent=0.99, end_percent=0.99, **FORMS["all"])
    assert torch.equal(lab.call(late), wanted)


@pytest.mark.parametrize("form", ["fp8 in ram", "merged"])
def test_promise_6_the_pass_runs_once_and_a_second_run_is_the_same(labs, form):
    lab = labs()
    person = lab.identity(51)
    cache(lab).drop(lambda _: True)
    samples = []
    with lab.counted_passes() as rows:
        for _ in range(2):
            samples.append(lab.sample(lab.patch(identity=person, **FORMS[form])[0], steps=2))
        lab.sample(lab.patch(identity=person, **FORMS[form])[0], seed=8, steps=1)
    assert sorted(rows) == [1] + [2] * 5
    assert torch.equal(*samples)


def test_every_form_is_an_entry_of_its_own(labs):
    lab = labs()
    person = lab.identity(52)
    cache(lab).drop(lambda _: True)
    for form in FORMS.values():
        lab.sample(lab.patch(identity=person, **form)[0], steps=1)
    assert cache(lab).stats().entries == len(FORMS)


def test_promise_7_the_order_of_references_does_not_matter(labs):
    lab = labs()
    person = lab.identity(3, weights=(1.0, 0.5, 2.0))
    turned = type(person)(person.references[::-1], person.encoder, person.name)
    a, b = (lab.call(lab.patch(identity=one, **FORMS["all"])[0]) for one in (person, turned))
    assert relative(a, b) < 1e-5


def test_promise_5_a_region_does_not_depend_on_the_other_persons_reference(labs):
    lab = labs()
    masks, first = fusion_lab.halves(), lab.sites[0]
    calls = []
    for other in (5, 6):
        routed = lab.routed([lab.identity(3), lab.identity(other)], masks)
        patched, _ = lab.patch(routed=routed, **FORMS["all"])
        calls.append(lab.calls_at(patched, first, steps=1)[0])
    a, b = calls
    left, right = (fusion_lab.tokens(mask, fusion_lab.grid_of(a)) for mask in masks)
    row = a.options["cond_or_uncond"].index(0)
    assert fusion_lab.largest(a.out[row, left] - b.out[row, left]) == 0.0
    assert fusion_lab.largest(a.out[row, right] - b.out[row, right]) > 1e-3


def test_the_negative_prompts_rows_are_untouched(labs):
    lab = labs()
    site = lab.sites[0]
    (ours,) = lab.calls_at(lab.patch(**FORMS["all"])[0], site, steps=1)
    (plain,) = lab.calls_at(lab.model, site, steps=1)
    row = ours.options["cond_or_uncond"].index(1)
    assert torch.equal(ours.out[row], plain.out[row])
    assert not torch.equal(ours.out[1 - row], plain.out[1 - row])


# Memory


@pytest.mark.parametrize(("dtype", "free"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_report_host_and_cache_agree_on_the_bytes(pack, small_models, dtype, free):
    """Counted before the pass, from shapes; after it, from the tensors. To the byte."""
    lab = FusionLab(pack, small_models, "sd15_tiny", dtype=dtype, reference_size=SIZE)
    given: dict[str, Any] = {"adapter": FREE, "timestep": "clean", "reference_size": SIZE} if free else {}
    store = pack.submodule("nodes.feature_store").feature_store(lab.model.model)
    sizes = {}
    for name, form in {"usual": {}, **FORMS}.items():
        cache(lab).drop(lambda _: True)
        patched, report = lab.patch(identity=lab.identity(60, weights=(1.0, 1.0)), **given, **form)
        counted = store.model_size()
        lab.sample(patched, steps=1)
        assert store.model_size() == counted == round(cache(lab).stats().mib * MIB)
        assert f"2 references, {counted / MIB:.1f} MiB" in report
        sizes[name] = counted
    assert sizes["ram"] == sizes["usual"] and sizes["fp8"] == sizes["fp8 in ram"]
    computed_in = pack.submodule("nodes.reference_cache").compute_dtype(lab.model.model)
    assert sizes["fp8"] / sizes["usual"] == pytest.approx(1 / computed_in.itemsize, rel=0.05)
    assert sizes["all"] < sizes["merged"] < sizes["usual"]


def test_the_report_names_the_form(labs):
    lab = labs()
    assert "MiB in fp8 in RAM (60% of the tokens)" in lab.patch(**FORMS["all"])[1]
    assert "MiB, kernel" in lab.patch()[1]
    small = lab.patch(reference_size=64, reference_tokens=0.5)[1]
    assert "(100% of the tokens)" in small, "grids of up to 256 tokens are left whole"


def test_features_in_ram_take_two_layers_of_a_gpu(labs, pack):
    """What the host is told there, and what it frees: features in RAM stay when the model leaves the GPU."""
    lab = labs()
    plans, caches = pack.submodule("nodes.fusion_plan"), pack.submodule("nodes.reference_cache")
    plan = plan_of(pack, lab, cache_device="cpu")
    whole = plans.features_bytes(plan, 2)
    assert plans.device_bytes(plan, 2, "cpu") == whole
    assert plans.device_bytes(plan, 2, "cuda") == whole // 2, "two of four equal layers"
    assert plans.device_bytes(plan_of(pack, lab), 2, "cuda") == whole
    storage = pack.submodule("attention.storage").Storage
    keys = {
        (place, device): caches.FeatureKey(-1, "", "", device, "", place, "", 1.0, storage("model", place), None)
        for place in ("model", "cpu")
        for device in ("cuda:0", "cpu")
    }
    features = pack.submodule("attention.cache").ReferenceFeatures({})
    for key in keys.values():
        cache(lab).get(key, lambda: features)
    caches.free_features(-1)
    assert cache(lab).drop(lambda key: key == keys["cpu", "cuda:0"]) == 1
    assert cache(lab).drop(lambda key: key.model == -1) == 0


def plan_of(pack: Any, lab: FusionLab, **inputs: Any) -> Any:
    """The plan that the node installs."""
    setup, found = pack.submodule("nodes.fusion_setup"), []
    real = setup.install_fusion
    try:
        setup.install_fusion = lambda model, plan: (found.append(plan), real(model, plan))[1]
        lab.patch(**inputs)
    finally:
        setup.install_fusion = real
    return found[0]


def test_features_in_ram_go_with_the_model(pack, small_models):
    import gc

    lab = FusionLab(pack, small_models, "sd15_tiny", reference_size=SIZE)
    cache(lab).drop(lambda _: True)
    patched, _ = lab.patch(cache_device="cpu")
    lab.sample(patched, steps=1)
    assert cache(lab).stats().entries == 1
    import comfy.model_management

    comfy.model_management.unload_all_models()
    caches = cache(lab)
    del lab, patched
    gc.collect()
    assert caches.stats().entries == 0


def test_the_next_layer_is_fetched_while_one_computes(labs, pack, monkeypatch):
    lab = labs()
    prefetch = pack.submodule("attention.prefetch")
    patched, _ = lab.patch(cache_device="cpu")
    lab.call(patched)
    events: list[str] = []
    real = prefetch.begin_copy

    def noted(layers: Any, device: Any) -> Any:
        events.append("begin")
        arrival = real(layers, device)
        return lambda: (events.append("take"), arrival())[1]

    monkeypatch.setattr(prefetch, "begin_copy", noted)
    lab.call(patched)
    assert events == ["begin", "begin", "take", "begin", "take", "begin", "take", "take"], "four layers, one call"


# Settings without an effect say so


def test_matched_references_are_merged_and_not_stored(labs):
    lab = labs()
    patched, report = lab.patch(timestep="matched", **FORMS["all"])
    assert "cache_precision and cache_device have no effect: matched references" in report
    cache(lab).drop(lambda _: True)
    with lab.counted_passes() as rows:
        lab.sample(patched, steps=2)
    assert sorted(rows) == [1] * 2 + [2] * 2 and cache(lab).stats().entries == 0
    assert lost(lab, {"timestep": "matched"}, FORMS["merged"]) <= 0.1, "noise makes tokens unlike each other"


def test_attention_maps_of_every_form_are_nearly_the_same(labs, pack):
    lab = labs()
    record = pack.nodes["FusedIDRecordAttention"]
    import peer_ours

    masks = fusion_lab.halves(gap=8)
    routed = lab.routed([lab.identity(3), lab.identity(4)], masks, feather=6)
    maps = {}
    for name, form in {"usual": {}, **FORMS}.items():
        patched, _ = lab.patch(routed=routed, **form)
        recorded, recording = peer_ours.run_node(record, model=patched)[:2]
        lab.sample(recorded, steps=1)
        maps[name] = torch.stack([share for _, share in recording.people()])
    for name in FORMS:
        assert fusion_lab.largest(maps[name] - maps["usual"]) < 0.01, name
    assert torch.equal(maps["ram"], maps["usual"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"cache_precision": "int4"}, "cache_precision is 'int4'; choose one of: model, fp8"),
     ({"cache_device": "cuda:7"}, "cache_device is 'cuda:7'; choose one of: model, cpu"),
     ({"reference_tokens": 0.0}, "reference_tokens is 0.0, accepted is 0.1 to 1"),
     ({"reference_tokens": float("nan")}, "reference_tokens is nan")],
)  # fmt: skip
def test_wrong_values_are_refused(labs, wrong, said):
    with pytest.raises(ValueError, match=f"FusedIDAttentionPatch: {said}"):
        labs().patch(**wrong)
