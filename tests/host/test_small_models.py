"""The small models are what the host's real loaders take for SD1.5 and SDXL, and they respond to their text."""

from __future__ import annotations

import math

import pytest
import torch

FAMILIES = {
    "sd15_tiny": ("SD15", 4),
    "sd15_full": ("SD15", 16),
    "sd15_inpaint": ("SD15", 4),
    "sdxl_tiny": ("Segmind_Vega", 17),
    "sdxl_full": ("SDXL", 70),
}


def predict(patcher, context, *, seed=0):
    """The UNet's noise prediction for a fixed 64 px input, through the host's model wrapper."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, model.diffusion_model.in_channels, 8, 8, generator=generator)
    extra = {"y": torch.ones(1, 2816)} if model.diffusion_model.num_classes else {}
    with torch.no_grad():
        return model.diffusion_model(latent, torch.tensor([500.0]), context=context, transformer_options={}, **extra)


@pytest.mark.parametrize("layout", FAMILIES)
def test_host_detects_the_family_and_the_text_matters(layout, comfyui, small_models):
    patcher = small_models.load_unet(layout)
    family, sites = FAMILIES[layout]
    assert type(patcher.model.model_config).__name__ == family
    names = [name for name, _ in patcher.model.diffusion_model.named_modules() if name.endswith(".attn2")]
    assert len(names) == sites

    one, other = (predict(patcher, small_models.conditioning(layout, seed=seed)[0][0]) for seed in (1, 2))
    assert torch.isfinite(one).all()
    assert 0.3 < one.std() < 3
    assert (one - other).std() > 0.02 * one.std()


def test_vae_round_trip_keeps_the_picture(comfyui, small_models):
    vae = small_models.load_vae()
    pictures = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    pictures = pictures.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    latents = vae.encode(pictures)
    assert latents.shape == (2, 4, 8, 8)
    assert 1 < latents.std() < 20  # raw latents: the host's 0.18215 scales them to about unit size
    decoded = vae.decode(latents)
    assert decoded.shape == pictures.shape
    assert (decoded - pictures).abs().mean() < 0.15
    assert (decoded - pictures.flip(0)).abs().mean() > 0.2


def test_checkpoint_loader_reads_unet_text_encoder_and_vae(comfyui, small_models):
    model, clip, vae = small_models.load_checkpoint("sd15_tiny")
    assert type(model.model.model_config).__name__ == "SD15"
    tokens = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in ("a man", "a dog in a hat")]
    assert tokens[0][0].shape == (1, 77, 768)
    assert torch.isfinite(tokens[0][0]).all()
    assert (tokens[0][0] - tokens[1][0]).std() > 0.1
    assert vae.encode(torch.rand(1, 64, 64, 3)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("layout", ["sd15_full", "sdxl_tiny"])
def test_adapter_fits_every_site_of_its_layout(layout, comfyui, small_models):
    from attention.adapter import check_adapter_fits, load_adapter
    from attention.sites import discover_sites

    sites = discover_sites(small_models.load_unet(layout).model.diffusion_model)
    adapter = load_adapter(small_models.adapter(layout))
    check_adapter_fits(adapter, sites, name=layout)
    assert adapter.settings.base == ("sd15" if layout == "sd15_full" else "custom")
    assert adapter.prompt_context is not None


def test_files_are_the_same_every_time(small_models, tmp_path):
    again = type(small_models)(tmp_path)
    assert again.unet("sd15_tiny").read_bytes() == small_models.unet("sd15_tiny").read_bytes()
    assert math.isclose(again.unet("sd15_tiny").stat().st_size, 25.8e6 * 4, rel_tol=0.01)
