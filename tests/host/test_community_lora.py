"""FaceID's LoRA part reaches the right weights through the host's own LoRA path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import community_files as files
import pytest
import torch
from safetensors.torch import save_file

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


def _lora_file(pack: Any, model: Any, adapter: Any, path: Path, change: float = 0.0) -> dict[str, torch.Tensor]:
    """The adapter's LoRA as its makers publish it beside the adapter: other names, half precision, alpha."""
    own = pack.submodule("attention.community.source").adapter_lora(adapter, _sites(pack, model))
    tensors = {}
    for name, weight in own.items():
        place, _, end = name.removeprefix("diffusion_model.").partition(".lora_")
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * float(weight.std())
        stored = f"lora_unet_{place.replace('.', '_')}"
        tensors[f"{stored}.lora_{end}"] = (weight + change * noise).half()
        tensors[f"{stored}.alpha"] = torch.tensor(RANK / 2)
    save_file(tensors, path)
    return tensors


def _deltas(model: Any) -> dict[str, torch.Tensor]:
    import comfy.lora
    import comfy.utils

    zero = {name: torch.zeros_like(comfy.utils.get_attr(model.model, name)).float() for name in model.patches}
    return {name: comfy.lora.calculate_weight(model.patches[name], zero[name], name) for name in zero}


def test_a_lora_that_a_loader_applied_is_not_added_again(
    pack: Any, small_models: Any, adapter: Any, tmp_path: Path
) -> None:
    import comfy.sd
    import comfy.utils

    model = small_models.load_unet("sd15_full")
    sites, module = _sites(pack, model), pack.submodule("nodes.community_lora")
    assert module.carried_lora(model, adapter, sites) is None
    _lora_file(pack, model, adapter, tmp_path / "lora.safetensors")
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    loaded, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)
    assert len(loaded.patches) == 16 * 2 * 4
    carried = module.carried_lora(loaded, adapter, sites)
    assert carried.layers == 16 * 2 * 4
    assert carried.lowest == pytest.approx(0.4, rel=5e-3) and carried.highest == pytest.approx(0.4, rel=5e-3)
    assert "strength 0.4, 128 layers" in carried.note("faceid.bin")
    again = module.with_adapter_lora(loaded, adapter, sites, 1.0)
    before, after = _deltas(loaded), _deltas(again)
    assert all(torch.equal(after[name], delta) for name, delta in before.items())
    assert sum(map(len, again.patches.values())) == sum(map(len, loaded.patches.values()))


def test_another_lora_of_the_same_layers_is_not_mistaken_for_it(
    pack: Any, small_models: Any, adapter: Any, tmp_path: Path
) -> None:
    import comfy.sd
    import comfy.utils

    model = small_models.load_unet("sd15_full")
    sites, module = _sites(pack, model), pack.submodule("nodes.community_lora")
    _lora_file(pack, model, adapter, tmp_path / "other.safetensors", change=0.1)
    lora = comfy.utils.load_torch_file(str(tmp_path / "other.safetensors"))
    loaded, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)
    assert module.carried_lora(loaded, adapter, sites) is None
    both = module.with_adapter_lora(loaded, adapter, sites, 1.0)
    assert sum(map(len, both.patches.values())) == 2 * 16 * 2 * 4


def test_two_of_our_nodes_add_it_once(pack: Any, small_models: Any, adapter: Any) -> None:
    model = small_models.load_unet("sd15_full")
    sites, module = _sites(pack, model), pack.submodule("nodes.community_lora")
    once = module.with_adapter_lora(model, adapter, sites, 0.5)
    twice = module.with_adapter_lora(once, adapter, sites, 1.0)
    assert twice is once
    assert module.carried_lora(twice, adapter, sites).lowest == pytest.approx(0.5)
