"""Self-attention separation in the real host."""

from __future__ import annotations

import pytest
import torch
from fusion_lab import record, relative

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def unet(comfyui, small_models):
    return small_models.load_unet("sd15_small")


@pytest.fixture
def patch(pack):
    return pack.submodule("nodes.separation").patch_separation


def two_masks() -> torch.Tensor:
    masks = torch.zeros(2, 64, 64)
    masks[0, :, :32], masks[1, :, 32:] = 1, 1
    return masks


def sample(model, conditioning, *, latent=None):
    import comfy.sample

    latent = torch.zeros(1, 4, 8, 8) if latent is None else latent
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    return comfy.sample.sample(
        model, noise, 1, 1.0, "euler", "normal", conditioning, conditioning, latent, disable_pbar=True, seed=7
    )


def calls_at(model, site, conditioning):
    return record(model, site.key, "attn1", lambda clone: sample(clone, conditioning))


def by_formula(call, amount: float) -> torch.Tensor:
    """Dense attention with the bias between two halves of the picture."""
    height, width = call.options["activations_shape"][-2:]
    left = (torch.arange(height * width) % width) < width // 2
    split = [t.unflatten(-1, (call.options["n_heads"], -1)).transpose(1, 2) for t in (call.q, call.k, call.v)]
    bias = -amount * (left[:, None] != left[None]).float()
    scores = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)


def test_separation_is_off_by_default_and_bit_for_bit(patch, unet, small_models):
    off = patch(unet, two_masks(), 0.0)
    assert torch.equal(sample(off, small_models.conditioning()), sample(unet, small_models.conditioning()))


def test_separation_is_the_written_formula_in_the_coarse_layers_and_nothing_in_the_others(
    patch, unet, pack, small_models
):
    """Queries, keys and values are caught on their way in; the layer's output follows from the dense bias."""
    before = sample(unet, small_models.conditioning())
    on = patch(unet, two_masks(), 3.0)
    sites = pack.submodule("attention.sites")
    found = sites.discover_sites(unet.model.diffusion_model)
    coarse = sites.layer_groups(found)["coarse"]
    assert 0 < len(coarse) < len(found)
    for site in found:
        call = calls_at(on, site, small_models.conditioning())[0]
        with_bias, without = by_formula(call, 3.0), by_formula(call, 0.0)
        assert relative(with_bias, without) > 1e-4 or call.q.shape[1] == 1
        expected = with_bias if site.path in coarse else without
        torch.testing.assert_close(call.out, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(sample(unet, small_models.conditioning()), before), "the input MODEL is as it was"


def test_applying_it_twice_is_applying_the_last(patch, unet, small_models):
    once = sample(patch(unet, two_masks(), 2.0), small_models.conditioning())
    twice = sample(patch(patch(unet, two_masks(), 9.0), two_masks(), 2.0), small_models.conditioning())
    assert torch.equal(once, twice)


def test_another_packs_replacement_stays_in_force(patch, unet, pack, small_models):
    from comfy.ldm.modules.attention import optimized_attention

    def doubled(q, k, v, options):
        return 2 * optimized_attention(q, k, v, options["n_heads"], transformer_options=options)

    theirs = unet.clone()
    sites = pack.submodule("attention.sites")
    found = sites.discover_sites(unet.model.diffusion_model)
    key = next(site.key for site in found if site.path in sites.layer_groups(found)["coarse"])
    theirs.set_model_attn1_replace(doubled, *key)
    plain = sample(theirs, small_models.conditioning())
    both = sample(patch(theirs, two_masks(), 1e-7), small_models.conditioning())
    assert relative(both, plain) < 1e-4
    assert relative(plain, sample(unet, small_models.conditioning())) > 1e-3


def test_an_area_of_the_latent_sees_its_part_of_the_masks(patch, unet, small_models):
    """A prompt for the left half shows person 1 alone, so there is nobody to hold apart; the whole latent has two."""
    on = patch(unet, two_masks(), 8.0)
    ((tokens, extra),) = small_models.conditioning()
    latent = torch.zeros(1, 4, 8, 8)
    change = {}
    for name, area in (("left half", (8, 4, 0, 0)), ("middle", (8, 4, 0, 2))):
        conditioning = [[tokens, {**extra, "area": area, "set_area_to_bounds": False}]]
        change[name] = relative(*(sample(model, conditioning, latent=latent) for model in (on, unet)))
    assert change["left half"] < 1e-4, "rounding"
    assert change["middle"] > 1e-2


def test_amounts_out_of_range_are_refused(patch, unet):
    with pytest.raises(ValueError, match="accepted is 0"):
        patch(unet, two_masks(), 50.0)
