"""FaceID's LoRA part reaches the right weights through the host's own LoRA path."""

from __future__ import annotations

from typing import Any

import community_files as files
import pytest
import torch

WIDTHS = (320,) * 16
RANK = 4


@pytest.fixture(scope="module")
def adapter(pack: Any) -> Any:
    """A FaceID file for the 16-site model of constant width."""
    shapes = files.file_shapes("faceid", "sd15", widths=WIDTHS, rank=RANK)
    source, recognise = (pack.submodule(f"attention.community.{name}") for name in ("source", "recognise"))
    found = recognise.recognise(shapes, name="faceid.bin")
    return source.CommunityAdapter("faceid.bin", found, files.random_tensors(shapes))


def _sites(pack: Any, model: Any) -> Any:
    return pack.submodule("attention.sites").discover_sites(model.model.diffusion_model)


def test_every_projection_gets_its_lora(pack: Any, small_models: Any, adapter: Any) -> None:
    model = small_models.load_unet("sd15_full")
    sites = _sites(pack, model)
    patched = pack.submodule("nodes.community_source").with_adapter_lora(model, adapter, sites, 0.5)
    assert len(patched.patches) == 16 * 2 * 4
    assert not model.patches
    order = pack.submodule("attention.community.layers").processor_order(sites)
    for i, site in enumerate(order):
        for attention, number in (("attn1", 2 * i), ("attn2", 2 * i + 1)):
            for part, target in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
                name = f"diffusion_model.{site.path}.{attention}.{target}.weight"
                up, down = (
                    adapter.weights[f"ip_adapter.{number}.to_{part}_lora.{side}.weight"] for side in ("up", "down")
                )
                _check_weight(patched, name, up @ down)


def _check_weight(patched: Any, name: str, delta: torch.Tensor) -> None:
    import comfy.lora
    import comfy.utils

    before = comfy.utils.get_attr(patched.model, name).float()
    after = comfy.lora.calculate_weight(patched.patches[name], before.clone(), name)
    torch.testing.assert_close(after - before, 0.5 * delta, atol=1e-5, rtol=1e-4)


def test_strength_zero_leaves_the_model_itself(pack: Any, small_models: Any, adapter: Any) -> None:
    model = small_models.load_unet("sd15_full")
    module = pack.submodule("nodes.community_source")
    assert module.with_adapter_lora(model, adapter, _sites(pack, model), 0.0) is model


def test_a_model_of_another_layout_is_refused(pack: Any, small_models: Any, adapter: Any) -> None:
    model = small_models.load_unet("sd15_small")
    module = pack.submodule("nodes.community_source")
    with pytest.raises(ValueError, match=r"faceid\.bin is for"):
        module.with_adapter_lora(model, adapter, _sites(pack, model), 1.0)
