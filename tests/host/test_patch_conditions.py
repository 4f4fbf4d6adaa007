"""FusedIDAttentionPatch in the ways people sample: batches, areas, passes, LoRA, ControlNet, dtypes, memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import fusion_lab
import peer_standins
import pytest
import torch
from fusion_lab import FusionLab, largest, relative


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sd15_tiny")


@pytest.fixture(scope="module")
def patched(lab: FusionLab) -> Any:
    return lab.patch()[0]


def test_guidance_of_1_runs_only_the_positive_prompt(lab, patched):
    with lab.counted_passes() as rows:
        ours = lab.sample(patched, cfg=1.0)
    assert set(rows) == {1}
    assert largest(ours - lab.sample(lab.model, cfg=1.0)) > 1e-3


def test_every_row_of_a_batch_is_what_it_is_alone(lab, patched):
    latents = fusion_lab.noise(3, fusion_lab.LATENT, seed=4)
    together = lab.call(patched, latent=latents)
    for row in range(3):
        alone = lab.call(patched, latent=latents[row : row + 1])
        assert relative(together[row : row + 1], alone) < 1e-5


def test_separate_calls_for_both_prompts_give_the_same(lab, patched, monkeypatch):
    """The host does so when memory is short."""
    wanted = lab.sample(patched)
    monkeypatch.setattr(lab.model.model, "memory_required", lambda *_, **__: 1e30, raising=False)
    with lab.counted_passes() as rows:
        ours = lab.sample(patched)
    assert set(rows) == {1}
    assert relative(ours, wanted) < 1e-5


def test_a_prompt_of_several_chunks_shows_the_face_in_each(lab, patched, small_models):
    both = small_models.conditioning(lab.layout, seed=1) + small_models.conditioning(lab.layout, seed=6)
    calls = lab.calls_at(patched, lab.sites[0], positive=both, steps=1)
    plain = lab.calls_at(lab.model, lab.sites[0], positive=both, steps=1)
    kinds = [kind for call in calls for kind in call.options["cond_or_uncond"]]
    rows = [row for call, other in zip(calls, plain) for row in (call.out - other.out).flatten(1).abs().amax(1)]
    assert sorted(kinds) == [0, 0, 1]
    assert [float(row) > 1e-3 for row in rows] == [kind == 0 for kind in kinds]


def test_the_negative_prompt_sees_the_face_only_when_asked(lab, patched):
    both, _ = lab.patch(apply_to="both")
    for model, wanted in ((patched, [False, True]), (both, [True, True])):
        (call,), (plain,) = (lab.calls_at(m, lab.sites[0], steps=1) for m in (model, lab.model))
        assert call.options["cond_or_uncond"] == [1, 0]
        changed = [bool(row > 1e-3) for row in (call.out - plain.out).flatten(1).abs().amax(1)]
        assert changed == wanted


def test_an_area_shows_the_part_of_the_masks_that_lies_in_it(lab, small_models):
    """The right half of the latent as an area of its own: there, the person of the right mask is everywhere."""
    import nodes

    right_only = small_models.conditioning(lab.layout, seed=6)
    area = nodes.ConditioningSetArea().append(right_only, 32, 64, 32, 0, 1.0)[0]
    people = [lab.identity(3), lab.identity(4)]
    routed = lab.routed(people, fusion_lab.halves(), background="none")
    model, _ = lab.patch(routed=routed)
    alone, _ = lab.patch(identity=people[1])
    prompt = lab.positive + area
    shown = {}
    for name, one in (("routed", model), ("alone", alone)):
        calls = lab.calls_at(one, lab.sites[0], positive=prompt, steps=1)
        shown[name] = [call.out[0] for call in calls if call.options["activations_shape"][-1] == 4]
    assert len(shown["routed"]) == len(shown["alone"]) == 1
    assert relative(shown["routed"][0], shown["alone"][0]) < 1e-5


def test_a_second_pass_at_another_size_scales_the_masks(lab):
    masks = fusion_lab.halves()
    routed = lab.routed([lab.identity(3), lab.identity(4)], masks)
    model, _ = lab.patch(routed=routed)
    other, _ = lab.patch(routed=lab.routed([lab.identity(3), lab.identity(5)], masks))
    for latent in (torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 12, 16), torch.zeros(1, 4, 9, 13)):
        a, b = (lab.calls_at(m, lab.sites[0], latent=latent, steps=1)[0] for m in (model, other))
        height, width = fusion_lab.grid_of(a)
        difference = (a.out - b.out)[1].abs().amax(1).view(height, width)
        assert float(difference[:, : width // 2].max()) == 0.0, "the left person is the same"
        assert float(difference[:, width // 2 + 1 :].min()) > 0.0, "the right one is not"


def test_image_to_image_keeps_the_picture_and_shows_the_face(lab, patched):
    latent = fusion_lab.noise(1, fusion_lab.LATENT, seed=9)
    ours, plain = (lab.sample(model, latent=latent, denoise=0.5, steps=4) for model in (patched, lab.model))
    assert largest(ours - plain) > 1e-3
    light, heavy = (lab.sample(patched, latent=latent, denoise=denoise, steps=4) for denoise in (0.02, 1.0))
    assert relative(light, latent) < 0.5 * relative(heavy, latent)


def test_an_inpainting_unet_is_patched_too(pack, small_models):
    import nodes

    lab = FusionLab(pack, small_models, "sd15_inpaint")
    pixels, mask = torch.rand(1, 64, 64, 3), fusion_lab.halves()[0][None]
    positive, negative, latent = nodes.InpaintModelConditioning().encode(
        lab.positive, lab.negative, pixels, lab.vae, mask, noise_mask=True
    )
    given = {"positive": positive, "negative": negative, "latent": latent["samples"]}
    model, report = lab.patch()
    assert report.startswith("4 of 4 layers")
    ours = lab.sample(model, **given)
    assert bool(torch.isfinite(ours).all())
    assert largest(ours - lab.sample(lab.model, **given)) > 1e-3


# LoRA and ControlNet


def lora_on(lab: FusionLab, model: Any, strength: float, name: str = "attn2.to_q") -> Any:
    """A LoRA on one layer, as the host's own loader applies it."""
    import comfy.sd

    path = f"{lab.sites[0].path}.{name}"
    width_out, width_in = lab.unet.get_submodule(path).weight.shape
    generator = torch.Generator().manual_seed(1)
    lora = {
        f"diffusion_model.{path}.lora_up.weight": torch.randn(width_out, 2, generator=generator),
        f"diffusion_model.{path}.lora_down.weight": torch.randn(2, width_in, generator=generator) / width_in**0.5,
    }
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
    assert sum(map(len, changed.patches.values())) == 1 + sum(map(len, model.patches.values()))
    return changed


def test_a_lora_acts_in_the_picture_and_in_the_reference_pass(lab):
    """Before or after our node is the same; its first layer changes what the reference's later layers see."""
    before, _ = lab.patch(lora_on(lab, lab.model, 0.8))
    after = lora_on(lab, lab.patch()[0], 0.8)
    none, _ = lab.patch()
    a, b, c = (lab.sample(model) for model in (before, after, none))
    assert relative(a, b) < 1e-5
    assert relative(a, c) > 1e-3
    wide = [lora_on(lab, lab.model, 1.0, "attn1.to_v"), lab.model]
    keys = [lab.pack.submodule("nodes.reference_cache").CACHE for _ in wide]
    assert keys[0] is keys[1]
    entries = []
    for model in wide:
        keys[0].drop(lambda _: True)
        lab.sample(lab.patch(model)[0], steps=1)
        (entry,) = keys[0]._entries.values()
        entries.append(entry.layers[lab.sites[-1].path].key)
    assert relative(*entries) > 1e-4


def test_a_lora_hook_on_the_prompt_acts_in_the_reference_pass_of_its_steps(lab):
    import comfy.hooks

    model, _ = lab.patch()
    path = f"diffusion_model.{lab.sites[0].path}.attn2.to_q.weight"
    weight = lab.unet.state_dict()[path.removeprefix("diffusion_model.")]
    group = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    hook = group.hooks[0]
    hook.weights = {path: (torch.full_like(weight, 0.02),)}
    hook.need_weight_init = False
    prompt = [[tokens, {**values, "hooks": group}] for tokens, values in lab.positive]
    clone = model.clone()
    ours = lab.sample(clone, positive=prompt)
    assert bool(torch.isfinite(ours).all())
    assert relative(ours, lab.sample(model)) > 1e-4
    assert torch.equal(lab.sample(model), lab.sample(lab.patch()[0]))


def test_a_controlnet_acts_on_the_picture_and_not_on_the_reference(lab, patched):
    """A control that adds to the middle block; the reference pass must get none of it."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[int] = []

        def get_control(self, x_noisy: Any, t: Any, cond: Any, batched_number: int, transformer_options: Any) -> Any:
            self.rows.append(len(x_noisy))
            return {"middle": [torch.full((1, 320, 8, 8), 0.5)], "output": []}

        def copy(self) -> Control:
            return self

        def get_models(self) -> list[Any]:
            return []

    control = Control()
    control.set_cond_hint(torch.zeros(1, 3, 64, 64))
    prompt = [
        [tokens, {**values, "control": control, "control_apply_to_uncond": True}] for tokens, values in lab.positive
    ]
    fresh, _ = lab.patch(identity=lab.identity(77))
    with lab.counted_passes() as rows:
        ours = lab.sample(fresh, positive=prompt)
    assert sorted(rows) == [1, 2, 2, 2]
    assert set(control.rows) == {2}
    assert relative(ours, lab.sample(fresh)) > 1e-3
    assert relative(ours, lab.sample(lab.model, positive=prompt)) > 1e-3


# Numbers and memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_other_types_give_nearly_the_same_picture(lab, patched, small_models, dtype):
    import nodes

    path = small_models.unet(lab.layout)
    if dtype in (torch.float16, torch.bfloat16):
        model = small_models.load_unet(lab.layout, dtype=dtype)
    else:
        name = {torch.float8_e4m3fn: "fp8_e4m3fn", torch.float8_e5m2: "fp8_e5m2"}[dtype]
        model = nodes.UNETLoader().load_unet(path.name, name)[0]
        assert any(weight.dtype == dtype for weight in model.model.diffusion_model.state_dict().values())
    ours, report = lab.patch(model)
    assert report.startswith("4 of 4 layers")
    with_face, plain = lab.call(ours), lab.call(model)
    assert bool(torch.isfinite(with_face).all())
    wanted = lab.call(patched) - lab.call(lab.model)
    loose = {torch.float16: 0.03, torch.bfloat16: 0.2, torch.float8_e4m3fn: 0.6, torch.float8_e5m2: 0.9}[dtype]
    assert relative(with_face - plain, wanted) < loose


def little_memory(_: Any = None, torch_free_too: bool = False) -> Any:
    """What the host's get_free_memory says of a device with 4 MiB left."""
    return (2**22, 2**22) if torch_free_too else 2**22


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[str]:
    """The host as under --novram or --lowvram, with the CPU as the device whose memory is short."""
    import comfy.model_management as management

    management.unload_all_models()
    state = {"novram": management.VRAMState.NO_VRAM, "lowvram": management.VRAMState.LOW_VRAM}[request.param]
    monkeypatch.setattr(management, "vram_state", state)
    monkeypatch.setattr(management, "is_device_cpu", lambda _: False)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    if request.param == "lowvram":
        monkeypatch.setattr(management, "get_free_memory", little_memory)
    yield request.param
    management.unload_all_models()


@pytest.mark.parametrize("short_of_memory", ["novram", "lowvram"], indirect=True)
@pytest.mark.parametrize("timestep", ["clean", "matched"])
def test_a_model_that_is_streamed_from_memory_gives_the_same(lab, short_of_memory, small_models, timestep):
    if short_of_memory == "lowvram":  # the host keeps 128 MiB of weights in any case
        lab = FusionLab(lab.pack, small_models, "sd15_small")
    fresh = FusionLab(lab.pack, small_models, lab.layout)
    with pytest.MonkeyPatch.context() as normal:
        import comfy.model_management as management

        normal.setattr(management, "vram_state", management.VRAMState.DISABLED)
        wanted = lab.call(lab.patch(lora_on(lab, lab.model, 0.8), timestep=timestep)[0])
    model, _ = fresh.patch(lora_on(fresh, fresh.model, 0.8), timestep=timestep)
    ours = fresh.call(model)
    assert fresh.model.model.model_lowvram, "the host did stream the weights"
    assert relative(ours, wanted) < 1e-5


# The matched reference


def test_a_matched_reference_is_noised_to_every_step(lab):
    model, _ = lab.patch(timestep="matched", identity=lab.identity(3, weights=(1.0, 1.0)))
    with lab.counted_passes() as rows:
        ours = lab.sample(model, steps=3)
    assert sorted(rows) == [1] * 6 + [2] * 3
    assert relative(ours, lab.sample(lab.patch(identity=lab.identity(3, weights=(1.0, 1.0)))[0])) > 1e-4
    assert torch.equal(ours, lab.sample(model, steps=3)), "the reference's noise is a function of its content"
    plan_cache = lab.pack.submodule("nodes.reference_cache").CACHE
    before = plan_cache.stats().entries
    lab.sample(model, steps=2)
    assert plan_cache.stats().entries == before, "features of a single step are not worth keeping"


def test_a_matched_reference_reads_the_noise_of_the_step(lab):
    """At a vanishing noise level, matched is clean."""
    clean, matched = (lab.patch(timestep=mode)[0] for mode in ("clean", "matched"))
    sampling = lab.model.get_model_object("model_sampling")
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    near = relative(lab.call(matched, sigma=low), lab.call(clean, sigma=low))
    far = relative(lab.call(matched, sigma=high) - lab.call(lab.model, sigma=high),
                   lab.call(clean, sigma=high) - lab.call(lab.model, sigma=high))  # fmt: skip
    assert near < 0.05 < far


def test_the_positive_prompt_in_the_reference_pass(lab, small_models):
    empty, _ = lab.patch()
    positive, report = lab.patch(reference_text="positive")
    assert "the positive prompt" in report and "unlike the adapter: text positive" in report
    assert relative(lab.sample(positive), lab.sample(empty)) > 1e-4
    with lab.counted_passes() as rows:
        lab.sample(positive, positive=small_models.conditioning(lab.layout, seed=8), steps=2)
    assert sorted(rows) == [1, 2, 2], "another prompt is another pass"


# Composition


def test_two_patches_on_one_model_both_act(lab):
    one, two = lab.identity(3), lab.identity(4)
    first, _ = lab.patch(identity=one)
    second, _ = lab.patch(identity=two)
    both, _ = lab.patch(first, identity=two)
    outs = {}
    for name, model in (("plain", lab.model), ("first", first), ("second", second), ("both", both)):
        outs[name] = lab.calls_at(model, lab.sites[0], steps=1)[0].out
    sum_of_both = outs["plain"] + (outs["first"] - outs["plain"]) + (outs["second"] - outs["plain"])
    assert relative(outs["both"], sum_of_both) < 1e-5


def test_what_other_packs_add_to_a_clone_stays_in_the_clone(lab, patched):
    """Run after run on the same MODEL, with another weight: nothing is left of the run before."""
    keys = [site.key for site in lab.sites]
    first = lab.sites[0]
    plain, mine = (lab.calls_at(model, first, steps=1)[0].out for model in (lab.model, patched))
    unit = lab.calls_at(peer_standins.add_branch(lab.model, keys, 1.0), first, steps=1)[0].out - plain
    before = lab.sample(patched)
    for weight in (1.0, 0.5, 0.25):
        clone = peer_standins.add_branch(patched, keys, weight)
        added = lab.calls_at(clone, first, steps=1)[0].out - mine
        assert relative(added, weight * unit) < 1e-5
    assert torch.equal(lab.sample(patched), before)


def test_a_deep_copy_of_the_options_is_the_same_model(lab, patched):
    clone = patched.clone()
    clone.model_options = copy.deepcopy(patched.model_options)
    assert torch.equal(lab.sample(clone), lab.sample(patched))


def test_interrupting_the_reference_pass_stops_and_leaves_nothing(lab):
    import comfy.model_management as management

    model, _ = lab.patch(identity=lab.identity(91))
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        lab.sample(model)
    wanted = lab.sample(lab.patch(identity=lab.identity(91))[0])
    assert torch.equal(lab.sample(model), wanted)


def test_a_model_in_use_elsewhere_is_not_disturbed(lab, patched):
    """Two copies of the patched MODEL in one process, one of them in the middle of a run."""
    wanted_a, wanted_b = lab.sample(patched), lab.sample(lab.model)
    other = copy.copy(lab.negative)
    assert torch.equal(lab.sample(patched, negative=other), wanted_a)
    assert torch.equal(lab.sample(lab.model, negative=other), wanted_b)
