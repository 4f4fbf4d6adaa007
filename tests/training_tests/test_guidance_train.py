"""Training hybrid guidance (METHOD 2.5): samples, drops, what learns, and the files."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from memory_source import MemorySource
from PIL import Image
from safetensors.torch import load_file
from tiny_run import settings, train_tiny

from attention.guidance_file import load_guidance
from training.base import load_base
from training.config import TowerConfig, TrainConfig
from training.config_io import validate
from training.guidance_data import GuidanceDraw, guidance_drops
from training.guidance_task import face_width, guidance_settings
from training.randomness import generator
from training.unet_naming import unet_to_ldm
from training.vision import VisionTowers, clip_pixels

TOWERS = [{"name": "ViT-L/14", "width": 12}]


def values(base, run, **changes):
    return settings(base, run, method="guidance", guidance__towers=TOWERS, optimizer__lr=1e-3, **changes)


def config(**changes) -> TrainConfig:
    return validate(TrainConfig, values("base", "run", **changes), origin="test")


def test_drop_statistics_over_10k_samples():
    draws = [guidance_drops(config(), generator(0, 0, f"key{i}", "drop")) for i in range(10_000)]
    style, face = (sum(draw[place] for draw in draws) / 10_000 for place in (0, 1))
    both = sum(a and b for a, b in draws) / 10_000
    assert style == pytest.approx(0.64, abs=0.015)
    assert face == pytest.approx(0.10, abs=0.01)
    assert both == pytest.approx(0.064, abs=0.01), "the two drops are independent"


def test_a_picture_without_a_human_has_exactly_a_zero_face():
    draw, source = GuidanceDraw(config(), 8), MemorySource(4, non_human=(1,))
    assert torch.equal(draw(source, 1, 0)["face"], torch.zeros(8))
    kept = [draw(source, 0, epoch)["face"] for epoch in range(30)]
    dropped = [face for face in kept if not face.any()]
    assert 0 < len(dropped) < 15 and all(torch.equal(f, kept[0]) for f in kept if f.any())


def test_the_style_picture_has_no_face_left():
    whole = values("base", "run", data__augment={"flip": 0})
    whole["guidance"]["towers"] = [{"name": "T", "width": 12, "path": "somewhere"}]
    draw = GuidanceDraw(validate(TrainConfig, whole, origin="test"), 8)
    one, two = (draw(MemorySource(4), index, 0)["style_pixels"] for index in (0, 1))
    assert one.shape == (64, 64, 3) and torch.equal(one[32, 32], two[32, 32])
    assert not torch.equal(one[0, 0], two[0, 0])


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("which", ["tiny_base", "tiny_base_xl"])
def test_a_run_writes_the_linear_and_what_the_unet_learnt(train, which, request, tmp_path):
    base, run = request.getfixturevalue(which), tmp_path / "run"
    path = train_tiny(values(base, run, guidance__train=train, guidance__tokens=2, validation__every=2))
    guidance = load_guidance(path)
    assert guidance.settings.num_tokens == 2 and guidance.settings.face_width == 8
    assert guidance.settings.towers[0].name == "ViT-L/14" and guidance.settings.samples_seen == 8
    from diffusers import UNet2DConditionModel

    before = UNet2DConditionModel.from_pretrained(base / "unet").state_dict()
    if train == "full":
        after = load_file(run / "guidance_unet.safetensors")
        named = unet_to_ldm(before, 1)
        assert after.keys() == named.keys() and len(named) == len(before)
        assert any(not torch.equal(after[name], named[name].half()) for name in named)
    else:
        names = set(load_file(run / "guidance_lora.safetensors"))
        assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight" in names
        assert {name.rsplit(".", 1)[1] for name in names} == {"weight", "alpha"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(line["kind"] == "validation" for line in lines) == 2


def test_a_run_of_faces_alone_reads_no_style_and_leaves_none(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(MemorySource, "style", lambda *_: pytest.fail("no style is read"))
    path = train_tiny(values(tiny_base, tmp_path / "run", guidance__style_drop=1, data__variants=1))
    guidance = load_guidance(path)
    assert not guidance.linear.weight[:, : guidance.settings.style_width].any()
    assert guidance.linear.weight[:, guidance.settings.style_width :].any()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any(line["kind"] == "validation" for line in lines)


def test_the_file_names_the_face_encoder_and_the_prior_that_fits(tiny_base, tmp_path):
    one = [{"name": "ViT-L/14", "width": 768}]
    for name, towers, prior in (("tiny", TOWERS, ""), ("clip_l", one, "karlo"), ("both", one + TOWERS, "")):
        config = validate(
            TrainConfig, {**values(tiny_base, tmp_path / name), "guidance": {"towers": towers}}, origin=""
        )
        made = guidance_settings(config, load_base(config.model), MemorySource(2))
        assert (made.face_encoder, made.face_encoder_name, made.prior) == ("drawn", "drawn faces", prior)


def test_sdxl_is_told_no_pooled_text_and_no_prompt_is_encoded(tiny_base_xl, tmp_path, monkeypatch):
    from training.guidance_model import GuidanceModel
    from training.text import PromptEncoder

    told = []
    forward = GuidanceModel.forward
    monkeypatch.setattr(GuidanceModel, "forward", lambda self, *a: told.append(a[-1]) or forward(self, *a))
    monkeypatch.setattr(PromptEncoder, "forward", lambda *_: pytest.fail("guidance reads no prompt"))
    train_tiny(values(tiny_base_xl, tmp_path / "run"))
    width = 64  # of the tiny model's pooled text
    assert told and all(torch.equal(a["text_embeds"], torch.zeros(len(a["time_ids"]), width)) for a in told)
    assert told[0]["time_ids"].tolist() == [[128, 128, 0, 0, 64, 64]] * 2


def test_a_lora_run_leaves_the_unet_bit_identical(tiny_base, tmp_path, monkeypatch):
    from training import train as module

    kept = []
    finish = module.Trainer.finish
    monkeypatch.setattr(module.Trainer, "finish", lambda self: (kept.append(self), finish(self))[1])
    train_tiny(values(tiny_base, tmp_path / "run", guidance__train="lora"))
    from diffusers import UNet2DConditionModel

    before = UNet2DConditionModel.from_pretrained(tiny_base / "unet").state_dict()
    after = {name.replace(".base_layer", ""): w for name, w in kept[0].task.model.unet.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    trained = {name for name, _ in kept[0].task.trainable()}
    assert all(".lora_" in name or name.startswith("guidance.linear.") for name in trained)


def test_a_guidance_run_resumes_and_starts_from_a_file(tiny_base, tmp_path):
    whole = train_tiny(values(tiny_base, tmp_path / "whole", guidance__train="lora"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_tiny(values(tiny_base, tmp_path / "parts", guidance__train="lora", schedule__steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    parts = train_tiny(values(tiny_base, tmp_path / "parts", guidance__train="lora"))
    one, two = load_file(whole), load_file(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"guidance\.safetensors was made for"):
        train_tiny(values(tiny_base, tmp_path / "other", checkpoint__init_from=str(whole), guidance__tokens=7))


def test_validation_pictures_are_drawn(tiny_base, tmp_path):
    run = tmp_path / "run"
    train_tiny(values(tiny_base, run, validation__every=4, validation__pictures=2, validation__picture_steps=2))
    assert Image.open(run / "pictures" / "step_00000004.png").size == (128, 128)


def test_towers_are_encoded_with_clips_own_preprocessing(tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=12, **options))
    model.save_pretrained(tmp_path / "vit")
    towers = VisionTowers([TowerConfig(name="ViT", width=12, path=str(tmp_path / "vit"))])
    picture = MemorySource(2, size=80).picture(0)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    wanted = CLIPImageProcessor(**sizes)(images=[picture], return_tensors="pt")["pixel_values"]
    image = torch.from_numpy(picture)[None] / 255.0
    assert torch.allclose(clip_pixels(image, 32), wanted, atol=0.05)
    assert towers(image).shape == (1, 12)
    with pytest.raises(ValueError, match="gives 12 numbers, its width says 13"):
        VisionTowers([TowerConfig(name="ViT", width=13, path=str(tmp_path / "vit"))])(image)
    with pytest.raises(ValueError, match="no transformers CLIP vision folder"):
        VisionTowers([TowerConfig(name="ViT", width=13, path=str(tmp_path))])


def test_wrong_towers_and_missing_faces_are_refused():
    half_cached = values("base", "run")
    half_cached["guidance"]["towers"] = [TOWERS[0], {"name": "B", "width": 1, "path": "x"}]
    with pytest.raises(ValueError, match="either every tower has a path, or none"):
        validate(TrainConfig, half_cached, origin="test")
    with pytest.raises(ValueError, match="no identity to learn"):
        face_width(MemorySource(2, non_human=(0, 1)))
    with pytest.raises(ValueError, match="has 9 numbers, the others have 8"):
        [GuidanceDraw(config(), 8)(MemorySource(2, face_width=9), 0, epoch) for epoch in range(20)]
