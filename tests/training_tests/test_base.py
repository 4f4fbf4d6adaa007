"""Base models and configurations: what is accepted, and what the messages say about the rest."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import settings

from training.base import base_hash, load_base
from training.config import ModelConfig, TrainConfig
from training.config_io import dump_yaml, load_config, validate
from training.log import tracker_names
from training.optimizer import make_optimizer
from training.tasks import open_sources
from training.train import main


@pytest.mark.parametrize(("which", "pooled", "width"), [("tiny_base", False, 64), ("tiny_base_xl", True, 128)])
def test_a_folder_gives_unet_vae_and_text(which, pooled, width, request):
    base = load_base(ModelConfig(base=str(request.getfixturevalue(which))))
    tokens, pool = base.prompts(["a man", "", "a man"])
    assert (
        tokens.shape == (3, 77, width) and torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[0], tokens[1])
    )
    assert (pool is not None) == pooled and base.prompts.pools == pooled
    assert base.encode(torch.zeros(2, 3, 64, 64)).shape == (2, 4, 8, 8)
    assert not any(weight.requires_grad for weight in [*base.unet.parameters(), *base.vae.parameters()])


def test_moments_give_the_latents_of_the_encoder(tiny_base):
    base = load_base(ModelConfig(base=str(tiny_base)))
    pixels, noise = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    moments = base.vae.encode(pixels).latent_dist.parameters
    assert torch.allclose(base.from_moments(moments), base.encode(pixels), atol=1e-6)
    assert torch.allclose(base.from_moments(moments, noise), base.encode(pixels, noise), atol=1e-6)


def test_the_hash_is_of_the_unet_weights(tiny_base, tmp_path):
    first = base_hash(tiny_base)
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    assert base_hash(copy) == first
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert base_hash(copy) != first


def test_a_base_of_the_wrong_family_is_refused(tiny_base):
    with pytest.raises(ValueError, match=r"is a custom layout, but model.family asks for Stable Diffusion XL"):
        load_base(ModelConfig(base=str(tiny_base), family="sdxl"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_x.lora_up.weight": 1}, "is a LoRA; needed is a whole SD1.5 or SDXL checkpoint"),
        ({"input_blocks.0.0.weight": 1}, "is a bare UNet"),
        ({"double_blocks.0.img_attn.qkv.weight": 1}, "is no file of a known family"),
    ],
)
def test_files_that_are_no_base_model_are_named(tensors, message, tmp_path):
    save_file({name: torch.zeros(1) for name in tensors}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_base(ModelConfig(base=str(tmp_path / "model.safetensors")))


def test_folders_that_are_no_base_model_are_named(tiny_base, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_base(ModelConfig(base=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        load_base(ModelConfig(base=str(tmp_path)))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"is a FluxPipeline; FusedID trains on SD1\.5 and SDXL"):
        load_base(ModelConfig(base=str(tmp_path)))
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="broken could not be loaded"):
        load_base(ModelConfig(base=str(broken)))


def test_another_vae_takes_the_place_of_the_models_own(tiny_base, tmp_path):
    import tiny_models

    tiny_models.tiny_vae(seed=9).save_pretrained(tmp_path / "vae")
    pixels = torch.zeros(1, 3, 64, 64)
    own = load_base(ModelConfig(base=str(tiny_base))).encode(pixels)
    other = load_base(ModelConfig(base=str(tiny_base), vae=str(tmp_path / "vae"))).encode(pixels)
    assert not torch.allclose(own, other)
    with pytest.raises(ValueError, match=r"model\.vae"):
        load_base(ModelConfig(base=str(tiny_base), vae=str(tmp_path)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": {"step": 3}}, r"schedule\.step: unknown setting; did you mean 'schedule\.steps'"),
        ({"drops": {"face": 0.9, "text": 0.9}}, "must be at most 1"),
        ({"data": {"resolution": 500}}, "multiple of 64"),
        ({"validation": {"timesteps": [1000]}}, "0 to 999"),
        ({"schedule": {"steps": 3, "warmup": 4}}, "longer than schedule.steps"),
        ({"model": {"base": ""}}, "model.base is not set"),
        ({"engine": {"precision": "fp8"}}, "fp8"),
    ],
)
def test_configuration_typos_are_named(values, message):
    whole = settings("base", "run")
    for section, fields in values.items():
        whole[section] = {**whole.get(section, {}), **fields}
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig, whole, origin="run.yaml")


def test_the_saved_configuration_reads_back_equal(tmp_path):
    config = validate(TrainConfig, settings("base", "run"), origin="test")
    (tmp_path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
    assert load_config(TrainConfig, tmp_path / "config.yaml", ["seed=7", "ema.decay=null"]).ema.decay is None


def test_default_learning_rates_are_the_methods():
    assert validate(TrainConfig, settings("b", "r", optimizer__lr=None), origin="").peak_lr == 1e-4
    assert validate(TrainConfig, settings("b", "r", optimizer__lr=None, method="guidance"), origin="").peak_lr == 1e-6


def test_optional_packages_are_asked_for_by_name(monkeypatch):
    config = validate(TrainConfig, settings("b", "r", optimizer__name="adamw8bit"), origin="test")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        make_optimizer([torch.nn.Parameter(torch.ones(1))], config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        tracker_names(config.log.model_copy(update={"trackers": ("wandb",)}))
    assert tracker_names(config.log.model_copy(update={"trackers": None})) == []


def test_data_that_is_not_prepared_is_refused(tmp_path):
    config = validate(TrainConfig, settings("b", "r", data__root=str(tmp_path)), origin="test")
    with pytest.raises(ValueError, match=r"run python -m training\.prepare"):
        open_sources(config)


def test_the_command_line_ends_with_the_message_and_code_2(tmp_path, caplog):
    assert main(["--config", str(tmp_path / "missing.yaml")]) == 2
    assert "does not exist" in caplog.text
    assert main(["--set", "method=magic", "--set", "model.base=x"]) == 2
    assert "method" in caplog.text and "data.root is not set" not in caplog.text
