"""Files between training and the host: a single-file checkpoint as base, a trained LoRA and UNet in the host."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.host
TRAINING_TESTS = Path(__file__).parents[1] / "training_tests"
UNET = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 0],
    "transformer_depth_output": [1, 1, 0, 0],
    "transformer_depth_middle": 1,
}


@pytest.fixture(scope="module")
def tiny_models():
    sys.path.append(str(TRAINING_TESTS))
    return importlib.import_module("tiny_models")


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory) -> Path:
    return tiny_models.write_base(tmp_path_factory.mktemp("base") / "tiny", "sd15")


def single_file(folder: Path, path: Path) -> Path:
    """The folder's weights as one checkpoint, by the host's own name maps."""
    from comfy.diffusers_convert import convert_vae_state_dict
    from comfy.utils import unet_to_diffusers

    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    names = {new: old for new, old in unet_to_diffusers(UNET).items() if new in unet}
    assert names.keys() == unet.keys()
    weights = {f"model.diffusion_model.{names[name]}": weight for name, weight in unet.items()}
    weights |= {f"first_stage_model.{name}": weight for name, weight in convert_vae_state_dict(vae).items()}
    prefix = "cond_stage_model.transformer.text_model."
    weights |= {prefix + name.removeprefix("text_model."): weight for name, weight in text.items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return path


def test_a_single_file_checkpoint_is_the_same_base_as_its_folder(comfyui, folder, tmp_path):
    from training.base import load_base
    from training.config import ModelConfig

    file = single_file(folder, tmp_path / "tiny.safetensors")
    one = load_base(ModelConfig(base=str(folder)))
    two = load_base(ModelConfig(base=str(file), config=str(folder)))
    assert two.family == one.family and two.name == "tiny.safetensors"
    for name, weight in one.unet.state_dict().items():
        assert torch.equal(weight, two.unet.state_dict()[name]), name
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    assert torch.allclose(one.encode(pixels), two.encode(pixels), atol=1e-6)
    assert torch.equal(one.prompts(["a man"])[0], two.prompts(["a man"])[0])


@pytest.mark.parametrize("layout", ["sd15_small", "sdxl_tiny"])
def test_a_trained_lora_reaches_every_layer_it_names_in_the_host(layout, comfyui, small_models):
    import comfy.lora
    from diffusers_twin import diffusers_unet

    from attention.guidance_settings import GuidanceSettings, Tower
    from training.config import LoraConfig
    from training.guidance_model import GuidanceModel, lora_tensors
    from training.unet_sites import unet_sites

    patcher = small_models.load_unet(layout)
    unet = diffusers_unet(patcher)
    sites = unet_sites(unet)
    width = sites[0].site.context
    settings = GuidanceSettings(
        base="custom", towers=(Tower("T", 4),), face_width=4, face_encoder="", context_width=width
    )
    model = GuidanceModel(unet, settings, lora=LoraConfig(rank=2, alpha=2))
    tensors = lora_tensors(dict(model.trainable()), LoraConfig(rank=2, alpha=2))
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    loaded = comfy.lora.load_lora(tensors, keys)
    assert len(loaded) == len([name for name in tensors if name.endswith(".alpha")])
    assert len(loaded) == 2 * 4 * len(sites)


@pytest.mark.parametrize("layout", ["sd15_small", "sdxl_tiny"])
def test_a_trained_unet_loads_in_the_host_as_it_was(layout, comfyui, small_models):
    import comfy.sd
    from diffusers_twin import diffusers_unet

    from training.unet_naming import unet_to_ldm

    patcher = small_models.load_unet(layout)
    unet = diffusers_unet(patcher)
    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}
    weights = unet_to_ldm(weights, unet.config["layers_per_block"])
    loaded = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
    theirs, ours = loaded.model.diffusion_model.state_dict(), patcher.model.diffusion_model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].float(), ours[name].float()) for name in ours)
