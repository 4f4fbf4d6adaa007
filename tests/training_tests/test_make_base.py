"""A base model from nothing: the untrained folder, the autoencoder, the denoiser, and what they hand on."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_source import MemorySource
from safetensors.torch import load_file
from tiny_run import settings, train_tiny

from training.autoencoder_task import away_from_unit, edge_error
from training.base import load_base, vae_moments
from training.base_files import SD15_SCALE, taesd_to_vae, vae_to_taesd
from training.config import ModelConfig, TrainConfig
from training.config_io import validate
from training.data import PictureDraw, collate
from training.fusion_task import FusionTask
from training.latents import LatentStore
from training.new_base import write_new_base


@pytest.fixture(scope="module")
def new_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("new") / "base"
    return write_new_base(Namespace(out=str(out), multipliers=[1], layers=1, prediction="v_prediction", seed=0))


def kinds(run: Path, kind: str) -> list[dict]:
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if line["kind"] == kind]


def test_a_new_base_says_the_same_about_every_prompt(new_base):
    base = load_base(ModelConfig(base=str(new_base)))
    tokens, pooled = base.prompts(["a man", "", "a woman with a hat"])
    assert tokens.shape == (3, 77, 768) and pooled is None
    assert not tokens.any()
    assert base.family == "custom" and base.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_a_new_base_overwrites_nothing(new_base):
    with pytest.raises(ValueError, match="not empty"):
        write_new_base(Namespace(out=str(new_base), multipliers=[1], layers=1, prediction="epsilon", seed=0))
    with pytest.raises(ValueError, match="at least 1"):
        write_new_base(Namespace(out=str(new_base) + "2", multipliers=[0], layers=1, prediction="epsilon", seed=0))


def test_taesd_names_go_both_ways(new_base):
    weights = load_base(ModelConfig(base=str(new_base))).vae.state_dict()
    named = vae_to_taesd(weights)
    assert float(named["vae_scale"]) == pytest.approx(SD15_SCALE)
    assert {"taesd_encoder.0.weight", "taesd_decoder.1.weight", "taesd_decoder.19.bias"} <= named.keys()
    back = taesd_to_vae(named)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_an_autoencoder_without_a_spread_gives_its_latents_whatever_the_noise(new_base):
    base = load_base(ModelConfig(base=str(new_base)))
    pixels, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 4, 8, 8)
    mean, sampled = base.encode(pixels), base.encode(pixels, noise)
    torch.testing.assert_close(mean, base.vae.encode(pixels).latents)
    torch.testing.assert_close(mean, sampled, atol=2e-6, rtol=0)
    torch.testing.assert_close(base.from_moments(vae_moments(base.vae, pixels)), mean)


@pytest.fixture(scope="module")
def autoencoder_run(new_base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "autoencoder"
    changes = {"optimizer__lr": 2e-3, "autoencoder__crop": 32, "schedule__steps": 30, "schedule__batch_size": 4}
    train_tiny(settings(new_base, run, method="autoencoder", validation__pictures=2, **changes))
    return run


def test_the_autoencoder_learns_and_leaves_a_base_and_a_comfyui_file(new_base, autoencoder_run):
    losses = [line["loss"] for line in kinds(autoencoder_run, "train")]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert kinds(autoencoder_run, "validation")[-1]["psnr"] > 8
    trained = load_base(ModelConfig(base=str(autoencoder_run / "base"))).vae.state_dict()
    named = load_file(autoencoder_run / "vae.safetensors")
    assert torch.equal(named["taesd_decoder.19.weight"], trained["decoder.layers.18.weight"])
    before = load_base(ModelConfig(base=str(new_base)))
    assert not torch.equal(before.vae.state_dict()["decoder.layers.18.weight"], named["taesd_decoder.19.weight"])


def test_an_autoencoder_of_another_kind_is_refused(tiny_base, tmp_path):
    with pytest.raises(ValueError, match=r"AutoencoderKL.*new_base"):
        train_tiny(settings(tiny_base, tmp_path / "run", method="autoencoder"))


def test_edges_and_unit_latents_are_zero_exactly_where_they_should_be():
    picture = torch.rand(2, 3, 8, 8)
    assert not edge_error(picture + 0.25, picture).abs().gt(1e-6).any(), "a shift of brightness is no edge"
    assert bool((edge_error(picture.flip(3), picture) > 0.1).all())
    unit = torch.randn(8, 4, 16, 16)
    unit = (unit - unit.mean((0, 2, 3), keepdim=True)) / unit.std((0, 2, 3), keepdim=True)
    assert float(away_from_unit(unit)) < 1e-6 < float(away_from_unit(2 * unit))


@pytest.mark.parametrize("condition", ["text", "thumbnail"])
def test_the_denoiser_learns_and_its_base_carries_an_adapter(new_base, tmp_path, condition):
    run = tmp_path / "denoiser"
    changes = {"schedule__steps": 8, "data__variants": 1, "denoiser__condition": condition, "ema__decay": None}
    changes |= {"validation__every": 4, "validation__pictures": 1, "validation__picture_steps": 2}
    if condition == "thumbnail":
        changes["denoiser__people"] = (1, 2)
    path = train_tiny(settings(new_base, run, method="denoiser", **{**changes, "optimizer__lr": 3e-4}))
    assert path == run / "checkpoint.safetensors" and (run / "pictures" / "step_00000008.png").is_file()
    middle, last = (line["loss"] for line in kinds(run, "validation"))
    assert last < middle < 1, "at fixed noise; an untrained network's error is above 1"
    base, before = (load_base(ModelConfig(base=str(folder))) for folder in (run / "base", new_base))
    site = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    moved = (base.unet.get_parameter(site) - before.unet.get_parameter(site)).abs().amax(0) > 1e-4
    assert bool(moved.any()) == (condition == "thumbnail"), "zeros as text train no values"
    weights = load_file(path)
    assert "model.diffusion_model.out.2.weight" in weights and "first_stage_model.taesd_decoder.1.weight" in weights
    adapter = train_tiny(settings(run / "base", tmp_path / "fused", schedule__steps=1))
    assert adapter.is_file()


# ---- remembered latents and reference passes ----------------------------------------------------------------------


def config_for(base: Path, **changes: object) -> TrainConfig:
    return validate(TrainConfig, settings(base, Path("run"), **changes), origin="test")


def test_variants_repeat_the_augmentation_and_nothing_else(tiny_base):
    draw = PictureDraw(config_for(tiny_base, data__variants=2))
    source = MemorySource(16)
    epochs = [[draw(source, i, epoch) for i in range(16)] for epoch in range(4)]
    for first, third, second in zip(epochs[0], epochs[2], epochs[1]):
        assert torch.equal(first["pixels"], third["pixels"]) and first["picture_id"] == third["picture_id"]
        assert first["picture_id"] != second["picture_id"]
        assert not torch.equal(first["noise"], third["noise"])
    assert any(not torch.equal(a["pixels"], b["pixels"]) for a, b in zip(epochs[0], epochs[1])), "some are mirrored"


def test_remembered_latents_are_those_of_the_encoder_and_encoded_once(tiny_base):
    config = config_for(tiny_base, data__variants=1)
    base, draw, source = load_base(config.model), PictureDraw(config), MemorySource(4)
    batch = collate([draw(source, i, 0) for i in range(4)])
    store = LatentStore(base, config.data)
    first = store(batch)
    torch.testing.assert_close(first, base.encode(batch["pixels"]), atol=2e-3, rtol=2e-3)
    base.vae.encode = None
    assert torch.equal(store(batch), first)


def test_a_remembered_reference_pass_gives_the_same_loss(tiny_base):
    source = MemorySource(4)
    options = {"data__variants": 1, "drops__face": 0.0, "drops__both": 0.0}
    losses = []
    for remember in (False, True):
        config = config_for(tiny_base, reference__remember=remember, **options)
        task = FusionTask(config, load_base(config.model))
        task.to_device(torch.device("cpu"), torch.float32)
        batch = collate([task.draw(source, i, 0) for i in range(4)])
        with torch.no_grad():
            losses += [task.losses(task.model, batch) for _ in range(2)]
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, atol=1e-5, rtol=1e-5)


def test_remembering_what_changes_is_refused(tiny_base):
    for change in ({"data__variants": None}, {"reference__timestep": "matched"}, {"reference__text": "positive"}):
        with pytest.raises(ValueError, match=r"reference\.remember"):
            config_for(tiny_base, reference__remember=True, **{"data__variants": 2, **change})
