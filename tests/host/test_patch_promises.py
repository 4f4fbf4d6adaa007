"""The promises of DESIGN.md at the injection site inside the real host, through FusedIDAttentionPatch itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import fusion_lab
import pytest
import torch
from fusion_lab import FusionLab
from torch.utils._python_dispatch import TorchDispatchMode

from attention.cache import MIB
from attention.fusion import FaceControls, FaceKeys, length_term
from attention.grid import grid_at_level
from attention.naive import naive_decoupled_attention, naive_fused_attention
from attention.routing import token_weights

LAYOUTS = ["sd15_small", "sdxl_tiny"]


@pytest.fixture(scope="module")
def labs(pack: Any, small_models: Any) -> Any:
    return fusion_lab.labs_of(pack, small_models)


def options_of(model: Any) -> Any:
    """What a node may have changed in a MODEL, as plain data."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return id(value)

    return plain([model.model_options, model.patches, model.object_patches, model.wrappers, model.callbacks])


# Promise 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_promise_1_strength_0_is_the_unpatched_model_bit_for_bit(labs, layout):
    lab = labs(layout)
    patched, report = lab.patch(strength=0.0)
    assert torch.equal(lab.sample(patched), lab.sample(lab.model))
    assert "unpatched" in report


def test_promise_1_outside_start_and_end_is_the_unpatched_model_bit_for_bit(labs):
    lab = labs()
    patched, _ = lab.patch(start_percent=0.3, end_percent=0.6)
    sampling = lab.model.get_model_object("model_sampling")
    for percent, inside in ((0.1, False), (0.25, False), (0.45, True), (0.7, False), (0.95, False)):
        sigma = float(sampling.percent_to_sigma(percent))
        same = torch.equal(lab.call(patched, sigma=sigma), lab.call(lab.model, sigma=sigma))
        assert same is not inside, f"at {percent:.0%}"


def test_promise_1_the_ends_of_the_run_are_inside_by_default(labs):
    lab = labs()
    patched, _ = lab.patch()
    sampling = lab.model.get_model_object("model_sampling")
    for sigma in (float(sampling.sigma_max) * 1.5, float(sampling.sigma_max), float(sampling.sigma_min), 0.01):
        assert not torch.equal(lab.call(patched, sigma=sigma), lab.call(lab.model, sigma=sigma)), sigma


def test_promise_1_the_input_model_is_never_changed(labs):
    lab = labs()
    before, wanted = copy.deepcopy(options_of(lab.model)), lab.sample(lab.model)
    patched, _ = lab.patch()
    assert largest_change(lab, patched) > 1e-3
    assert options_of(lab.model) == before
    assert torch.equal(lab.sample(lab.model), wanted)


def test_promise_1_removing_the_node_restores_everything(labs):
    lab = labs()
    wanted = lab.sample(lab.model)
    weights = {name: weight.clone() for name, weight in lab.unet.state_dict().items()}
    for _ in range(2):
        lab.sample(lab.patch()[0])
    assert torch.equal(lab.sample(lab.model), wanted)
    assert all(torch.equal(weight, weights[name]) for name, weight in lab.unet.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lab.unet.modules())


def largest_change(lab: FusionLab, patched: Any) -> float:
    return fusion_lab.largest(lab.sample(patched) - lab.sample(lab.model))


# Promise 2

CASES = {
    "paper": {"length": "paper"},
    "balanced": {"length": "balanced"},
    "strength": {"strength": 2.5},
    "weak": {"strength": 0.2},
    "key and value strength": {"key_strength": 0.5, "value_strength": 1.7},
    "scale": {"attention_scale": 1.3},
    "decoupled": {"combine": "decoupled", "strength": 0.7},
    "smaller reference": {"reference_size": 32, "length": "balanced"},
    "larger reference": {"reference_size": 96, "length": "paper"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_promise_2_every_layer_computes_the_formula(labs, layout, case):
    """METHOD 1.1 at every site, from the pixels of the crop on: nothing of ours is used except the naive formula."""
    lab, inputs = labs(layout), CASES[case]
    person = lab.identity(3, weights=(1.0, 0.5))
    patched, _ = lab.patch(identity=person, **inputs)
    features = fusion_lab.features_by_hand(lab, person, inputs.get("reference_size", 64))
    for site in lab.sites:
        for call in lab.calls_at(patched, site, steps=1):
            wanted = by_hand(lab, site, call, person, features, inputs)
            assert fusion_lab.relative(call.out, wanted) < 1e-4, site.path


def by_hand(lab: FusionLab, site: Any, call: Any, person: Any, features: Any, inputs: dict[str, Any]) -> torch.Tensor:
    trained = math.prod(grid_at_level((8, 8), site.level))
    faces, mean = [], sum(reference.weight for reference in person.references) / len(person.references)
    for reference, found in zip(person.references, features):
        key, value = found[site.path]
        term = length_term(
            inputs.get("length", "balanced"), num_tokens=key.shape[1], num_references=len(features), num_trained=trained
        )
        faces.append(FaceKeys(key, value, 0, math.log(reference.weight / mean) + term))
    controls = FaceControls(
        inputs.get("strength", 1.0),
        inputs.get("key_strength", 1.0),
        inputs.get("value_strength", 1.0),
        inputs.get("attention_scale", 1.0),
    )
    formula = naive_decoupled_attention if inputs.get("combine") == "decoupled" else naive_fused_attention
    rows = positive_slice(call)
    out = naive_fused_attention(call.q, call.k, call.v, [], heads=site.heads)
    out[rows] = formula(call.q[rows], call.k[rows], call.v[rows], faces, heads=site.heads, controls=controls)
    return out


def positive_slice(call: Any) -> slice:
    kinds = call.options["cond_or_uncond"]
    rows = call.q.shape[0] // len(kinds)
    return slice(kinds.index(0) * rows, (kinds.index(0) + 1) * rows)


@pytest.mark.parametrize("background", ["all", "none"])
@pytest.mark.parametrize("feather", [0, 6])
def test_promise_2_every_layer_computes_the_routed_formula(labs, background, feather):
    lab = labs("sd15_small")
    people = [lab.identity(3), lab.identity(4)]
    routed = lab.routed(people, fusion_lab.halves(gap=12), background=background, feather=feather)
    patched, _ = lab.patch(routed=routed, length="paper")
    features = [fusion_lab.features_by_hand(lab, person)[0] for person in people]
    for site in lab.sites:
        faces = [FaceKeys(*found[site.path], index) for index, found in enumerate(features)]
        for call in lab.calls_at(patched, site, steps=1):
            weights = token_weights(routed.masks, fusion_lab.grid_of(call), background=background, soft=feather > 0)
            rows = positive_slice(call)
            wanted = naive_fused_attention(
                call.q[rows], call.k[rows], call.v[rows], faces, heads=site.heads, weights_IQ=weights
            )
            assert fusion_lab.relative(call.out[rows], wanted) < 1e-4, site.path


# Promise 4


@pytest.mark.parametrize(("layout", "count"), [("sd15_full", 16), ("sdxl_full", 70)])
def test_promise_4_every_layer_is_patched_and_the_report_says_so(labs, layout, count):
    lab = labs(layout)
    patched, report = lab.patch()
    assert report.startswith(f"{count} of {count} layers, 1 reference")
    plain = changed_layers(lab, lab.model)
    ours = changed_layers(lab, patched)
    assert len(ours) == count
    assert all(not torch.equal(ours[key], plain[key]) for key in plain)


def changed_layers(lab: FusionLab, model: Any) -> dict[Any, torch.Tensor]:
    """The output of every cross-attention layer, with everything before it as in the plain model."""
    from comfy.ldm.modules.attention import optimized_attention

    outputs, handles = {}, []
    for site in lab.sites:
        layer, state = lab.unet.get_submodule(site.path).attn2, {}

        def note(name: str, state: Any = state) -> Any:
            return lambda _, __, out: state.update({name: out})

        def plain(_: Any, given: Any, state: Any = state, site: Any = site) -> Any:
            if len(given[0]) == 2:  # the picture's rows; the reference passes alone
                outputs[site.key] = given[0].clone()
                return (optimized_attention(state["q"], state["k"], state["v"], site.heads),)
            return None

        handles += [getattr(layer, f"to_{name}").register_forward_hook(note(name)) for name in "qkv"]
        handles.append(layer.to_out.register_forward_pre_hook(plain))
    try:
        lab.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def test_promise_4_a_layer_that_another_node_took_is_an_error_that_names_it(labs):
    """Somebody runs one block past the host's patches, as packs that replace `forward` do."""
    lab = labs()
    patched, _ = lab.patch()
    block = lab.unet.get_submodule(lab.sites[1].path)

    def taken(x: Any, context: Any = None, transformer_options: Any = None) -> Any:
        x = block.attn1(block.norm1(x)) + x
        x = block.attn2(block.norm2(x), context=context) + x
        return block.ff(block.norm3(x)) + x

    block.forward = taken
    try:
        with pytest.raises(ValueError, match=r"FusedIDAttentionPatch: only 3 of 4 layers act; 1 were taken by .*taken"):
            lab.sample(patched)
        lab.sample(lab.model)
    finally:
        del block.forward
    lab.sample(patched)


def test_promise_4_a_layer_that_nobody_runs_is_not_lost(labs):
    """Packs such as DeepCache leave blocks out at some steps."""
    lab = labs()
    patched, _ = lab.patch()
    block = lab.unet.get_submodule(lab.sites[1].path)
    block.forward = lambda x, context=None, transformer_options=None: x
    try:
        ours = lab.sample(patched)
        assert fusion_lab.largest(ours - lab.sample(lab.model)) > 1e-3
    finally:
        del block.forward


def test_layer_groups_change_only_their_layers(labs):
    lab = labs("sd15_small")
    plain = changed_layers(lab, lab.model)
    for group in ("down", "middle", "up", "coarse", "fine"):
        patched, report = lab.patch(layers=group)
        ours = changed_layers(lab, patched)
        active = {key for key in plain if not torch.equal(ours[key], plain[key])}
        wanted = {site.key for site in lab.sites if in_group(lab, site, group)}
        assert active == wanted, group
        assert report.startswith(f"{len(wanted)} of {len(lab.sites)} layers")


def in_group(lab: FusionLab, site: Any, group: str) -> bool:
    widest = max(other.channels for other in lab.sites)
    return {
        "down": site.path.startswith("input"), "middle": site.path.startswith("middle"),
        "up": site.path.startswith("output"), "coarse": site.channels == widest, "fine": site.channels < widest,
    }[group]  # fmt: skip


# Promise 5


@pytest.mark.parametrize("combine", ["fused", "decoupled"])
def test_promise_5_a_region_does_not_depend_on_the_other_persons_reference(labs, combine):
    lab = labs("sd15_small")
    masks = fusion_lab.halves()
    first = lab.sites[0]  # before it, both runs are the same
    outs = []
    for other in (5, 6):
        routed = lab.routed([lab.identity(3), lab.identity(other)], masks)
        patched, _ = lab.patch(routed=routed, combine=combine)
        outs.append(lab.calls_at(patched, first, steps=1)[0])
    a, b = outs
    rows, grid = positive_slice(a), fusion_lab.grid_of(a)
    left, right = (fusion_lab.tokens(mask, grid) for mask in masks)
    assert len(left) == len(right) == math.prod(grid) // 2
    assert fusion_lab.largest(a.out[rows][:, left] - b.out[rows][:, left]) == 0.0
    assert fusion_lab.largest(a.out[rows][:, right] - b.out[rows][:, right]) > 1e-3


# Promise 6


def test_promise_6_a_new_seed_prompt_or_step_count_costs_no_pass(labs, small_models):
    lab = labs()
    patched, _ = lab.patch(identity=lab.identity(11, weights=(1.0, 1.0)))
    with lab.counted_passes() as rows:
        lab.sample(patched, steps=3)
    assert sorted(rows) == [1, 1, 2, 2, 2], "one pass per reference, then one per step"
    again, _ = lab.patch(identity=lab.identity(11, weights=(1.0, 1.0)))
    with lab.counted_passes() as rows:
        lab.sample(patched, steps=3, seed=8)
        lab.sample(patched, steps=5)
        lab.sample(patched, steps=2, positive=small_models.conditioning(lab.layout, seed=5), cfg=5.0)
        lab.sample(patched, steps=2, latent=torch.zeros(1, 4, 16, 8))
        lab.sample(again, steps=2)
    assert rows == [2] * 14


def test_promise_6_other_weights_or_another_adapter_make_a_pass(labs, small_models):
    lab = labs()
    person = lab.identity(12)
    lab.sample(lab.patch(identity=person)[0])
    with_lora = lab.model.clone()
    name = "diffusion_model." + lab.sites[0].path + ".attn2.to_q.weight"
    with_lora.add_patches({name: (torch.full_like(lab.unet.state_dict()[name[16:]], 0.01),)})
    other = FusionLab(lab.pack, small_models, lab.layout)
    other.adapter = small_models.adapter(lab.layout, seed=1)
    for model, owner in ((with_lora, lab), (lab.model, other)):
        patched, _ = owner.patch(model, identity=person)
        with lab.counted_passes() as rows:
            lab.sample(patched, steps=1)
        assert sorted(rows) == [1, 2]


def test_promise_6_the_cache_is_bounded_shown_and_freed_with_the_model(pack, small_models):
    lab = FusionLab(pack, small_models, "sd15_tiny")
    cache = pack.submodule("nodes.reference_cache").CACHE
    cache.drop(lambda _: True)
    lab.sample(lab.patch(identity=lab.identity(20))[0], steps=1)
    _, report = lab.patch(identity=lab.identity(21))
    one = cache.stats().mib
    assert f"cache before this run: 1 entries, {one:.1f} of {cache.stats().budget_mib:.0f} MiB" in report
    numbers = sum(2 * 64 * site.channels for site in lab.sites)
    assert one == pytest.approx(4 * numbers / MIB, rel=1e-6), "fp32 keys and values"
    budget = cache.stats().budget_mib
    try:
        cache.set_budget(2.5 * one)
        for seed in range(22, 27):
            lab.sample(lab.patch(identity=lab.identity(seed))[0], steps=1)
        assert cache.stats().entries == 2
    finally:
        cache.set_budget(budget)
    import comfy.model_management

    comfy.model_management.unload_all_models()
    assert cache.stats().entries == 0


def test_features_larger_than_the_budget_still_cost_one_pass_per_run(labs, pack):
    lab = labs()
    cache = pack.submodule("nodes.reference_cache").CACHE
    budget = cache.stats().budget_mib
    patched, _ = lab.patch(identity=lab.identity(30))
    try:
        cache.set_budget(0.001)
        with lab.counted_passes() as rows:
            lab.sample(patched, steps=4)
    finally:
        cache.set_budget(budget)
    assert sorted(rows) == [1, 2, 2, 2, 2]


# Promise 7


def test_promise_7_the_order_of_references_does_not_matter(labs):
    lab = labs()
    person = lab.identity(3, weights=(1.0, 0.5, 2.0))
    turned = type(person)(person.references[::-1], person.encoder, person.name)
    a, b = (lab.sample(lab.patch(identity=one)[0]) for one in (person, turned))
    assert fusion_lab.relative(a, b) < 1e-5
    assert largest_change(lab, lab.patch(identity=person)[0]) > 1e-3


def test_promise_7_the_order_of_people_with_their_masks_does_not_matter(labs):
    lab = labs("sd15_small")
    people, masks = [lab.identity(3), lab.identity(4)], fusion_lab.halves(gap=8)
    a = lab.sample(lab.patch(routed=lab.routed(people, masks))[0])
    b = lab.sample(lab.patch(routed=lab.routed(people[::-1], masks[::-1]))[0])
    c = lab.sample(lab.patch(routed=lab.routed(people[::-1], masks))[0])
    assert fusion_lab.relative(a, b) < 1e-5
    assert fusion_lab.relative(a, c) > 1e-3


def test_promise_12_only_the_proportions_of_reference_weights_count(labs):
    """50 and 50 are 1 and 1; one photo of weight 5 is one of weight 1; a mix of A with A is A (METHOD 1.1)."""
    lab = labs()
    for given, same in (((50.0, 50.0), (1.0, 1.0)), ((5.0,), (1.0,)), ((3.0, 1.0), (0.6, 0.2))):
        a, b = (lab.sample(lab.patch(identity=lab.identity(3, weights=weights))[0]) for weights in (given, same))
        assert fusion_lab.relative(a, b) < 1e-5
    uneven, even = (lab.sample(lab.patch(identity=lab.identity(3, weights=w))[0]) for w in ((3.0, 1.0), (1.0, 1.0)))
    assert fusion_lab.relative(uneven, even) > 1e-3
    person = lab.identity(3)
    mixed = lab.pack.submodule("faces.mix").mix_identities([person, person], [1.0, 1.0]).identity
    a, b = (lab.sample(lab.patch(identity=one, length="balanced")[0]) for one in (mixed, person))
    assert fusion_lab.relative(a, b) < 1e-4


# Promise 9


@pytest.mark.parametrize("feather", [0, 6])
def test_promise_9_a_kernel_that_ignores_masks_changes_nothing(labs, feather):
    """SageAttention and flash drop masks silently: here such a kernel takes over every attention of the model."""
    lab = labs("sd15_small")
    people = [lab.identity(3, weights=(1.0, 0.4)), lab.identity(4)]
    routed = lab.routed(people, fusion_lab.halves(gap=8), feather=feather)
    patched, _ = lab.patch(routed=routed, strength=1.7)
    wanted = lab.sample(patched)
    calls = []

    def blind(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *__: Any, **named: Any) -> Any:
        calls.append(named.get("mask"))
        b, n, c = q.shape
        q, k, v = (t.view(b, -1, heads, c // heads).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(2, 3)) * (c // heads) ** -0.5
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)

    patched.model_options["transformer_options"]["optimized_attention_override"] = blind
    assert fusion_lab.relative(lab.sample(patched), wanted) < 1e-4
    assert len(calls) > 40 and all(mask is None for mask in calls)


# Speed: nothing waits for the device in a layer


class Reads(TorchDispatchMode):
    """Counts operations that would wait for a device: reading a value, or a shape that depends on values."""

    waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(function) for name in self.waits)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("inputs", "allowed"), [({}, 0), ({"start_percent": 0.1, "end_percent": 0.9}, 1)])
def test_no_host_sync_per_layer(labs, inputs, allowed):
    """Per step. Once per run, percents become noise levels."""
    lab = labs("sd15_small")
    routed = lab.routed([lab.identity(3), lab.identity(4)], fusion_lab.halves(gap=8), feather=5)
    patched, _ = lab.patch(routed=routed, **inputs)
    lab.sample(patched, steps=5)

    def reads(model: Any, steps: int) -> int:
        with Reads() as found:
            lab.sample(model, steps=steps)
        return found.count

    per_step = [(reads(model, 5) - reads(model, 2)) / 3 for model in (lab.model, patched)]
    assert per_step[1] - per_step[0] <= allowed
