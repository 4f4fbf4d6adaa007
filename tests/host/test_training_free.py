"""Training-free mode: the reference's self-attention keys and values beside the picture's own, in the real host."""

from __future__ import annotations

from typing import Any

import fusion_lab
import pytest
import torch
from fusion_lab import Call, FusionLab, relative

from attention.fusion import FaceControls, FaceKeys
from attention.naive import naive_fused_attention

FREE = "training-free"
CROSS = "training-free in cross-attention (experimental)"


@pytest.fixture(scope="module")
def labs(pack: Any, small_models: Any) -> Any:
    made: dict[str, FusionLab] = {}

    def lab(layout: str = "sd15_tiny") -> FusionLab:
        return made.setdefault(layout, FusionLab(pack, small_models, layout)) if layout not in made else made[layout]

    return lab


def free(lab: FusionLab, **inputs: Any) -> Any:
    """The node without an adapter, on small references."""
    return lab.patch(**{"adapter": FREE, "reference_size": 64, **inputs})


def reference_states(lab: FusionLab, person: Any) -> dict[tuple[Any, ...], tuple[torch.Tensor, ...]]:
    """q, k, v of every self-attention when the clean reference passes with the positive prompt."""
    import numpy as np
    from comfy.ldm.modules.attention import optimized_attention

    states = {}

    def note(q: Any, k: Any, v: Any, extra: Any) -> Any:
        states[(*extra["block"], extra["block_index"])] = (q, k, v)
        return optimized_attention(q, k, v, extra["n_heads"])

    pixels = torch.from_numpy(person.references[0].crop.astype(np.float32) / 255)[None]
    latent = lab.model.model.process_latent_in(lab.vae.encode(pixels))
    options = {"patches_replace": {"attn1": {site.key: note for site in lab.sites}}}
    with torch.no_grad():
        lab.unet(latent, torch.zeros(1), context=lab.positive[0][0], transformer_options=options)
    return states


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_every_layer_computes_shared_attention(labs, strength):
    lab = labs("sd15_small")
    person = lab.identity(3)
    patched, report = free(lab, identity=person, timestep="clean", strength=strength)
    assert report.startswith("7 of 7 layers, 1 reference") and "in self-attention" in report
    states = reference_states(lab, person)
    for site in lab.sites:
        (call,) = lab.calls_at(patched, site, "attn1", steps=1)
        _, key, value = states[site.key]
        face = FaceKeys(key, value)
        wanted = naive_fused_attention(call.q, call.k, call.v, [], heads=site.heads)
        rows = slice(call.options["cond_or_uncond"].index(0), None)
        wanted[rows] = naive_fused_attention(
            call.q[rows], call.k[rows], call.v[rows], [face], heads=site.heads, controls=FaceControls(strength)
        )
        assert relative(call.out, wanted) < 1e-4, site.path


def test_the_default_reference_follows_the_noise_of_every_step(labs):
    lab = labs()
    patched, report = free(lab)
    assert "the positive prompt" in report
    with lab.counted_passes() as rows:
        lab.sample(patched, steps=3)
    assert sorted(rows) == [1, 1, 1, 2, 2, 2]


def test_a_clean_reference_runs_once(labs):
    lab = labs()
    patched, _ = free(lab, timestep="clean", identity=lab.identity(40))
    with lab.counted_passes() as rows:
        lab.sample(patched, steps=3)
        lab.sample(patched, steps=3, seed=9)
    assert sorted(rows) == [1] + [2] * 6


def test_strength_0_and_outside_the_window_are_the_unpatched_model(labs):
    lab = labs()
    assert torch.equal(lab.sample(free(lab, strength=0.0)[0]), lab.sample(lab.model))
    patched, _ = free(lab, start_percent=0.3, end_percent=0.6)
    sampling = lab.model.get_model_object("model_sampling")
    for percent, inside in ((0.1, False), (0.45, True), (0.9, False)):
        sigma = float(sampling.percent_to_sigma(percent))
        assert torch.equal(lab.call(patched, sigma=sigma), lab.call(lab.model, sigma=sigma)) is not inside


def test_a_region_does_not_depend_on_the_other_persons_reference(labs):
    lab, masks = labs("sd15_small"), fusion_lab.halves()
    calls = []
    for other in (5, 6):
        routed = lab.routed([lab.identity(3), lab.identity(other)], masks)
        for adain in (False, True):
            patched, _ = free(lab, routed=routed, timestep="clean", adain=adain)
            calls.append(lab.calls_at(patched, lab.sites[0], "attn1", steps=1)[0])
    for a, b in (calls[::2], calls[1::2]):
        left, right = (fusion_lab.tokens(mask, fusion_lab.grid_of(a)) for mask in masks)
        positive = a.options["cond_or_uncond"].index(0)
        assert fusion_lab.largest(a.out[positive, left] - b.out[positive, left]) == 0.0
        assert fusion_lab.largest(a.out[positive, right] - b.out[positive, right]) > 1e-3


def test_adain_moves_the_statistics_towards_the_reference(labs, pack):
    """With a mask nobody else has, the restyled queries have the reference's mean and deviation."""
    lab = labs()
    person = lab.identity(3)
    plain, _ = free(lab, identity=person, timestep="clean")
    styled, _ = free(lab, identity=person, timestep="clean", adain=True)
    a, b = (lab.calls_at(model, lab.sites[0], "attn1", steps=1)[0] for model in (plain, styled))
    query, key, value = reference_states(lab, person)[lab.sites[0].key]
    rows = slice(1, 2)
    restyled = [restyle(x[rows], like) for x, like in ((a.q, query), (a.k, key))]
    wanted = naive_fused_attention(*restyled, a.v[rows], [FaceKeys(key, value)], heads=lab.sites[0].heads)
    assert relative(b.out[rows], wanted) < 1e-3
    assert relative(b.out[rows], a.out[rows]) > 1e-3
    assert torch.equal(b.out[:1], a.out[:1]), "the negative prompt is untouched"


def restyle(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(1)) / x.std(1, correction=0) * like.std(1, correction=0) + like.mean(1)


def test_layer_groups_choose_the_resolutions(labs):
    lab = labs("sd15_small")
    for group in ("coarse", "fine"):
        patched, report = free(lab, layers=group, timestep="clean")
        widest = max(site.channels for site in lab.sites)
        wanted = [site for site in lab.sites if (site.channels == widest) == (group == "coarse")]
        assert report.startswith(f"{len(wanted)} of 7 layers")
        for site in lab.sites:
            (call,) = lab.calls_at(patched, site, "attn1", steps=1)
            own = naive_fused_attention(call.q, call.k, call.v, [], heads=site.heads)
            assert (relative(call.out, own) > 1e-3) == (site in wanted), site.path


@pytest.mark.parametrize("layout", ["sd15_tiny", "sdxl_tiny"])
@pytest.mark.parametrize("adapter", [FREE, CROSS])
def test_a_picture_without_any_weights_differs_by_the_person(labs, layout, adapter):
    lab = labs(layout)
    pictures = [lab.sample(free(lab, adapter=adapter, identity=lab.identity(seed))[0]) for seed in (3, 4)]
    plain = lab.sample(lab.model)
    assert all(bool(torch.isfinite(picture).all()) for picture in pictures)
    assert relative(pictures[0], plain) > 1e-3 and relative(pictures[0], pictures[1]) > 1e-4


def test_cross_attention_uses_the_layers_own_self_attention_projections(labs):
    lab = labs("sd15_small")
    person = lab.identity(3)
    patched, report = free(lab, adapter=CROSS, identity=person)
    assert "in self-attention" not in report
    for site in lab.sites:
        (call,) = lab.calls_at(patched, site, steps=1)
        attn1 = lab.unet.get_submodule(site.path).attn1
        h = norm2_states(lab, person)[site.key]
        face = FaceKeys(attn1.to_k(h).detach(), attn1.to_v(h).detach())
        rows = slice(1, 2)
        wanted = naive_fused_attention(call.q[rows], call.k[rows], call.v[rows], [face], heads=site.heads)
        assert relative(call.out[rows], wanted) < 1e-4


def norm2_states(lab: FusionLab, person: Any) -> dict[tuple[Any, ...], torch.Tensor]:
    import numpy as np

    pixels = torch.from_numpy(person.references[0].crop.astype(np.float32) / 255)[None]
    latent = lab.model.model.process_latent_in(lab.vae.encode(pixels))
    return fusion_lab.hidden_states(lab, latent, {"reference_prompt.context": lab.positive[0][0][0]})


def test_another_packs_self_attention_patch_stays_in_force(labs):
    """A pack that replaced the layer before us, and one that does so in a clone of ours (as PAG in its own pass)."""
    lab = labs()
    key = lab.sites[0].key

    def doubled(q: Any, k: Any, v: Any, extra: Any) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        return 2 * optimized_attention(q, k, v, extra["n_heads"])

    before = lab.model.clone()
    before.set_model_attn1_replace(doubled, *key)
    person = lab.identity(3)
    ours, _ = free(lab, identity=person, timestep="clean")
    both, _ = free(lab, model=before, identity=person, timestep="clean")
    plain, theirs, mine, sum_of_both = (first_call(lab, model) for model in (lab.model, before, ours, both))
    assert relative(sum_of_both.out, theirs.out + mine.out - plain.out) < 1e-5
    assert relative(mine.out, plain.out) > 1e-3


def first_call(lab: FusionLab, model: Any) -> Call:
    return lab.calls_at(model, lab.sites[0], "attn1", steps=1)[0]
