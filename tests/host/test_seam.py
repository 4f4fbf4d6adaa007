"""The pack beside other packs in one layer, one pass and one run: what others set late acts, and so do we.

Value level: what a layer gives is compared with the formulas of `attention.naive` on what the layer received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusion_lab
import peer_standins
import pytest
import torch
from fusion_lab import Call, FusionLab, halves, largest, record, relative
from torch import Tensor

from attention.fusion import FaceKeys
from attention.naive import naive_fused_attention
from attention.separation import memberships

EXTRA = {
    "SelfAttentionGuidance": "nodes_sag", "PerturbedAttentionGuidance": "nodes_pag", "HyperTile": "nodes_hypertile",
    "TomePatchModel": "nodes_tomesd", "ModelSamplingDiscrete": "nodes_model_advanced",
    "ModelSamplingContinuousEDM": "nodes_model_advanced",
}  # fmt: skip
AMOUNT = 5.0


@pytest.fixture(scope="module")
def labs(pack: Any, small_models: Any) -> Callable[..., FusionLab]:
    return fusion_lab.labs_of(pack, small_models)


def core(lab: FusionLab, name: str, model: Any, *given: Any) -> Any:
    """A MODEL through one of the host's own nodes, old style or new."""
    node = getattr(lab.pack.host.extra(EXTRA[name]), name)
    if hasattr(node, "define_schema"):
        result = node.execute(model, *given)
        return result.args[0] if hasattr(result, "args") else result[0]
    return getattr(node(), node.FUNCTION)(model, *given)[0]


def free(lab: FusionLab, model: Any = None, **inputs: Any) -> Any:
    return lab.patch(model, adapter="training-free", reference_size=64, timestep="clean", **inputs)[0]


def separated(lab: FusionLab, model: Any = None) -> Any:
    routed = lab.routed([lab.identity(0), lab.identity(1)], halves(), separation=AMOUNT)
    return lab.patch(model, routed=routed)[0]


FORMS = {"training-free": free, "separation": separated}


def middle(lab: FusionLab) -> Any:
    return next(site for site in lab.sites if site.key[0] == "middle")


def ours_alone(lab: FusionLab, call: Call, form: str, site: Any) -> Tensor:
    """The layer's output by the formula, from what it received."""
    if form == "separation":
        grid = fusion_lab.grid_of(call)
        member = memberships(torch.stack(halves()), grid)
        other = -AMOUNT * (member.sum(0)[:, None] * member.sum(0)[None] - member.T @ member)
        return dense_attention(call, site.heads, other)
    face = reference_face(lab, site)
    out = naive_fused_attention(call.q, call.k, call.v, [], heads=site.heads)
    for row, kind in enumerate(call.options["cond_or_uncond"]):
        if kind == 0:
            one = slice(row, row + 1)
            out[one] = naive_fused_attention(call.q[one], call.k[one], call.v[one], [face], heads=site.heads)
    return out


def dense_attention(call: Call, heads: int, term: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (call.q, call.k, call.v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return ((scores if term is None else scores + term).softmax(-1) @ v).transpose(1, 2).flatten(2)


def reference_face(lab: FusionLab, site: Any) -> FaceKeys:
    """Keys and values of the reference at a layer's self-attention: the clean latent with the positive prompt."""
    import numpy as np

    seen: dict[Any, Tensor] = {}
    layer = lab.unet.get_submodule(site.path).attn1
    handles = [
        getattr(layer, f"to_{name}").register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out.clone()})
        )
        for name in "kv"
    ]
    pixels = torch.from_numpy(lab.identity().references[0].crop.astype(np.float32) / 255)[None]
    latent = lab.model.model.process_latent_in(lab.vae.encode(pixels))
    y = None
    if lab.model.model.adm_channels:
        y = lab.model.model.encode_adm(
            pooled_output=lab.positive[0][1]["pooled_output"], width=64, height=64, crop_w=0, crop_h=0, target_width=64,
            target_height=64, device=torch.device("cpu"),
        )  # fmt: skip
    try:
        with torch.no_grad():
            lab.unet(latent.float(), torch.zeros(1), context=lab.positive[0][0], y=y, transformer_options={})
    finally:
        for handle in handles:
            handle.remove()
    return FaceKeys(seen["k"], seen["v"])


# What another node sets for one pass of a step, or after us


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["sd15_tiny", "sdxl_tiny"])
def test_perturbed_attention_guidance_perturbs_beside_us(labs, layout, form):
    """Its pass replaces the middle layer's self-attention by the values, under the host's short name of the block."""
    lab = labs(layout)
    site = middle(lab)
    perturbed = core(lab, "PerturbedAttentionGuidance", FORMS[form](lab), 3.0)
    calls = record(perturbed, site.key, "attn1", lambda model: lab.call(model))
    assert [len(call.options["cond_or_uncond"]) for call in calls] == [2, 1]
    for call, pag in zip(calls, (False, True)):
        ours, plain = ours_alone(lab, call, form, site), dense_attention(call, site.heads)
        assert relative(ours, plain) > 1e-3
        assert relative(call.out, call.v + (ours - plain) if pag else ours) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_self_attention_guidance_leaves_the_middle_layer_to_us(labs, form, ours_first):
    lab = labs()
    site = middle(lab)

    def sag(model: Any) -> Any:
        return core(lab, "SelfAttentionGuidance", model, 0.0, 2.0)

    both = sag(FORMS[form](lab)) if ours_first else FORMS[form](lab, sag(lab.model))
    call = record(both, site.key, "attn1", lambda model: lab.call(model))[0]
    ours = ours_alone(lab, call, form, site)
    assert relative(call.out, ours) < 1e-5
    assert relative(ours, dense_attention(call, site.heads)) > 1e-3


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("attention", ["attn1", "attn2"])
def test_a_pack_that_takes_a_layer_for_itself_keeps_what_it_does(labs, attention, parts, ours_first):
    """As couple packs do, by either name of the layer, before us or after us."""
    lab = labs()
    site = lab.sites[0]

    def doubled(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        return 2 * dense_attention(Call(q, k, v, extra, q), extra["n_heads"])

    def theirs(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_patch_replace(doubled, attention, *site.key[:parts])
        return clone

    def ours(model: Any) -> Any:
        return free(lab, model) if attention == "attn1" else lab.patch(model)[0]

    both = theirs(ours(lab.model)) if ours_first else ours(theirs(lab.model))
    plain, they, we, sum_of_both = (
        record(model, site.key, attention, lambda one: lab.call(one))[0].out
        for model in (lab.model, theirs(lab.model), ours(lab.model), both)
    )
    assert relative(sum_of_both, they + we - plain) < 1e-5
    assert relative(we, plain) > 1e-3 and relative(they, plain) > 1e-3


@pytest.mark.parametrize("attention", ["attn1", "attn2"])
def test_a_pack_that_writes_into_its_queries_keeps_what_it_does(labs, attention):
    """Smoothed energy guidance blurs them in place."""
    lab = labs()
    site = lab.sites[0]

    def blurred(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        q[:] = q.mean(1, keepdim=True)
        return dense_attention(Call(q, k, v, extra, q), extra["n_heads"])

    def theirs(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_patch_replace(blurred, attention, *site.key)
        return clone

    ours = free(lab) if attention == "attn1" else lab.patch()[0]
    plain, they, we, both = (
        record(model, site.key, attention, lambda one: lab.call(one))[0].out
        for model in (lab.model, theirs(lab.model), ours, theirs(ours))
    )
    assert relative(both, they + we - plain) < 1e-5
    assert relative(we, plain) > 1e-3 and relative(they, plain) > 1e-3


def test_two_patches_on_one_model_each_add_what_they_add_alone(labs):
    """METHOD 1.1, in both orders and bit for bit the same."""
    lab = labs()
    site = lab.sites[0]
    people = [lab.identity(0), lab.identity(1)]
    one, two = (lab.patch(identity=person)[0] for person in people)
    both = lab.patch(one, identity=people[1])[0]
    turned = lab.patch(two, identity=people[0])[0]
    plain, a, b, ab, ba = (
        record(model, site.key, "attn2", lambda m: lab.call(m))[0].out for model in (lab.model, one, two, both, turned)
    )
    assert (
        "another FusedID Attention Patch acts on this model already (they add up)"
        in lab.patch(one, identity=people[1])[1]
    )
    assert "(the same person twice)" in lab.patch(one, identity=people[0])[1]
    assert "another FusedID" not in lab.patch(identity=people[0])[1]
    assert relative(ab, a + b - plain) < 1e-5
    assert relative(ba, ab) < 1e-6
    assert relative(a, plain) > 1e-3 and relative(a, b) > 1e-3


@pytest.mark.parametrize("form", ["guidance", "separation"])
def test_what_packs_add_does_not_pile_up_over_runs(labs, form, pack):
    """Kept upstream MODELs are cloned by every run: each run's addition must be the only one in it."""
    lab = labs()
    keys = [site.key for site in lab.sites]
    ours = separated(lab) if form == "separation" else routed_guidance(lab, pack)
    first = lab.sites[0]
    plain = record(ours, first.key, "attn2", lambda m: lab.call(m))[0]
    for weight in (1.0, 0.5, 0.25):
        clone = peer_standins.add_branch(ours, keys, weight)
        call = record(clone, first.key, "attn2", lambda m: lab.call(m))[0]
        assert torch.equal(call.q, plain.q)
        assert relative(call.out - plain.out, weight * torch.tanh(call.q.flip(-1))) < 1e-4


def routed_guidance(lab: FusionLab, pack: Any) -> Any:
    routing = pack.submodule("attention.guidance_routing").GuidanceRouting(torch.stack(halves()), 4, "mean", 0)
    return pack.submodule("nodes.guidance_patch").patch_guidance(lab.model, routing)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_pack_around_the_unet_that_sets_a_layer_there_is_met(labs, by_name):
    """Wrappers of the UNet itself run after all other preparations; ControlNet references set theirs in one."""
    import comfy.patcher_extension as extension

    lab = labs()
    site = lab.sites[0]

    def doubled(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        return 2 * dense_attention(Call(q, k, v, extra, q), extra["n_heads"])

    def around(executor: Any, x: Any, t: Any, context: Any, y: Any, control: Any, options: Any, **named: Any) -> Any:
        options = {**options, "patches_replace": {"attn2": {site.key[:2]: doubled}}}
        if by_name:
            return executor(x, t, context, y, control, transformer_options=options, **named)
        return executor(x, t, context, y, control, options, **named)

    def theirs(model: Any) -> Any:
        clone = model.clone()
        clone.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "theirs", around)
        return clone

    ours, _ = lab.patch()
    plain, they, we, both, turned = (
        record(model, site.key, "attn2", lambda one: lab.call(one))[0].out
        for model in (lab.model, theirs(lab.model), ours, theirs(ours), lab.patch(theirs(lab.model))[0])
    )
    assert relative(both, they + we - plain) < 1e-5
    assert torch.equal(both, turned)
    assert relative(we, plain) > 1e-3 and relative(they, plain) > 1e-3


# Tokens and rows that others change


def test_hypertile_and_training_free_each_do_their_part(labs):
    """Core HyperTile cuts the queries into tiles of their own rows; the host reads keys and values as as many tiles."""
    lab = labs()
    site = lab.sites[0]
    torch.manual_seed(0)
    tiled = core(lab, "HyperTile", free(lab), 32, 2, 0, False)
    call = record(tiled, site.key, "attn1", lambda model: lab.call(model))[0]
    tiles = len(call.q) // len(call.k)
    assert tiles > 1, "HyperTile is at work"
    k, v = (t.reshape(len(call.q), -1, t.shape[-1]) for t in (call.k, call.v))
    wanted = naive_fused_attention(call.q, k, v, [], heads=site.heads)
    row = call.options["cond_or_uncond"].index(0) * tiles
    rows = slice(row, row + tiles)
    face = reference_face(lab, site)
    wanted[rows] = naive_fused_attention(call.q[rows], k[rows], v[rows], [face], heads=site.heads)
    assert relative(call.out, wanted) < 1e-5


@pytest.mark.parametrize("merging", ["HyperTile", "TomePatchModel"])
@pytest.mark.parametrize("what", ["routed", "separation", "adain"])
def test_merged_or_tiled_tokens_are_refused_where_people_have_places(labs, merging, what):
    lab = labs()
    given = (32, 2, 0, False) if merging == "HyperTile" else (0.5,)
    routed = lab.routed([lab.identity(0), lab.identity(1)], halves())
    model = {
        "routed": lambda: free(lab, routed=routed),
        "separation": lambda: separated(lab),
        "adain": lambda: free(lab, adain=True),
    }[what]()
    with pytest.raises(ValueError, match=r"merges or tiles the tokens .*Remove it \(HyperTile, ToMe\), or"):
        lab.call(core(lab, merging, model, *given))


def test_an_adapter_beside_hypertile_or_tome_works_as_ever(labs):
    """They change self-attention only; routed people in cross-attention stay where they are."""
    lab = labs()
    routed = lab.routed([lab.identity(0), lab.identity(1)], halves())
    site = lab.sites[0]
    for name, given in (("TomePatchModel", (0.5,)), ("HyperTile", (32, 2, 0, False))):
        a, b = (
            record(core(lab, name, lab.patch(routed=r)[0], *given), site.key, "attn2", lambda m: lab.call(m))[0]
            for r in (routed, lab.routed([lab.identity(0), lab.identity(2)], halves()))
        )
        left, right = (fusion_lab.tokens(mask, fusion_lab.grid_of(a)) for mask in halves())
        row = a.options["cond_or_uncond"].index(0)
        if torch.equal(a.q, b.q):  # HyperTile draws its tiles anew
            assert largest(a.out[row, left] - b.out[row, left]) == 0.0
            assert largest(a.out[row, right] - b.out[row, right]) > 1e-3


# Values of the host that are only final when sampling starts


@pytest.mark.parametrize(
    ("node", "given", "start", "end"),
    [
        ("ModelSamplingDiscrete", ("v_prediction", True), 0.3, 1.0),
        ("ModelSamplingContinuousEDM", ("edm_playground_v2.5", 120.0, 0.002), 0.0, 0.5),
    ],
)
def test_start_and_end_follow_the_schedule_that_is_sampled(labs, node, given, start, end):
    """Also when the node that sets the schedule comes after ours."""
    lab = labs()

    def acting(model: Any) -> list[bool]:
        site = lab.sites[0]
        calls = record(model, site.key, "attn2", lambda m: lab.sample(m, steps=10, scheduler="normal"))
        faces = []
        for call in calls:
            row = call.options["cond_or_uncond"].index(0)
            plain = dense_attention(call, site.heads)
            faces.append(relative(call.out[row], plain[row]) > 1e-4)
        return faces

    before = acting(lab.patch(core(lab, node, lab.model, *given), start_percent=start, end_percent=end)[0])
    after = acting(core(lab, node, lab.patch(start_percent=start, end_percent=end)[0], *given))
    assert before == after and True in before and False in before
    sampling = core(lab, node, lab.model, *given).get_model_object("model_sampling")
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 10)[:-1]
    first = float("inf") if start == 0 else sampling.percent_to_sigma(start)
    last = 0.0 if end == 1 else sampling.percent_to_sigma(end)
    assert before == [bool(last <= sigma <= first) for sigma in sigmas]


# Weights by name


def hook_lora(lab: FusionLab, seed: int = 0, strength: float = 1.0) -> Any:
    """A LoRA on the prompt, as Create Hook LoRA makes it."""
    import comfy.hooks

    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for site in lab.sites:
        name = f"diffusion_model.{site.path}.attn1.to_q"
        lora[f"{name}.lora_up.weight"] = torch.randn(site.channels, 4, generator=generator) * 0.05
        lora[f"{name}.lora_down.weight"] = torch.randn(4, site.channels, generator=generator) * 0.05
    return comfy.hooks.create_hook_lora(lora=lora, strength_model=strength, strength_clip=0.0)


def test_promise_6_an_unchanged_hook_lora_costs_no_pass_and_leaves_no_dead_entry(labs, pack):
    lab = labs()
    cache = pack.submodule("nodes.reference_cache").CACHE
    cache.drop(lambda _: True)
    patched, _ = lab.patch(identity=lab.identity(77))
    group = hook_lora(lab)

    def passes(hooks: Any) -> int:
        prompts = [
            [[text, {**values, "hooks": hooks} if hooks is not None else values] for text, values in prompt]
            for prompt in (lab.positive, lab.negative)
        ]
        before = cache.stats().misses
        lab.sample(patched, steps=2, positive=prompts[0], negative=prompts[1])
        return cache.stats().misses - before

    assert [passes(None), passes(None)] == [1, 0]
    assert [passes(group), passes(group), passes(group), passes(None)] == [1, 0, 0, 0]
    assert cache.stats().entries == 2
    assert passes(hook_lora(lab, seed=1)) == 1, "other weights are other weights"
    assert passes(hook_lora(lab, strength=0.5)) == 1
    # Weights that are gone cannot come back: the two hooks that nobody holds are let go at the next miss.
    assert passes(None) == 0
    import gc

    gc.collect()
    lab.sample(lab.patch(identity=lab.identity(78))[0], steps=1)
    assert cache.stats().entries <= 4


def test_promise_6_a_lora_that_is_loaded_again_with_equal_strength_costs_no_pass(labs, pack):
    import comfy.sd

    lab = labs()
    patched, _ = lab.patch(identity=lab.identity(79))
    (hook,) = hook_lora(lab).hooks
    with_lora = [comfy.sd.load_lora_for_models(patched, None, hook.weights, s, 0.0)[0] for s in (0.8, 0.8, 0.4)]
    with lab.counted_passes() as rows:
        for model in with_lora:
            lab.sample(model, steps=1)
    assert sorted(rows) == [1, 1, 2, 2, 2]


# Texts that other packs repeat


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_a_text_do_not_weaken_the_face(labs, copies, small_models):
    """Couple packs repeat the texts of all regions to one length; a region's face must weigh as beside one copy."""
    lab = labs()
    site = lab.sites[0]
    other = small_models.conditioning(lab.layout, seed=9)[0][0]

    def repeated(n: Tensor, context: Tensor, value: Tensor, extra: Any) -> tuple[Tensor, Tensor, Tensor]:
        return n, context.repeat(1, copies, 1), value.repeat(1, copies, 1)

    once = peer_standins.couple(lab.patch()[0], [other])
    several = once.clone()
    several.set_model_attn2_patch(repeated)
    a, b = (record(model, site.key, "attn2", lambda m: lab.call(m))[0] for model in (once, several))
    assert b.k.shape[1] == copies * a.k.shape[1] and len(a.q) == 3
    assert relative(b.out, a.out) < 1e-5
    assert relative(a.out, dense_attention(a, site.heads)) > 1e-3


def test_the_report_names_who_else_is_in_the_layers(labs):
    lab = labs()
    busy = core(lab, "HyperTile", lab.model, 32, 2, 0, False)
    _, report = lab.patch(busy, adapter="training-free", reference_size=64)
    assert "beside other nodes in these layers: comfy_extras.nodes_hypertile (HyperTile." in report
    assert "beside" not in lab.patch(busy)[1], "HyperTile is not in cross-attention"
    routed = lab.routed([lab.identity(0), lab.identity(1)], halves(), separation=AMOUNT)
    assert "people held apart in self-attention (separation 5)" in lab.patch(routed=routed)[1]
