"""Between guidance training and the host: a picture's conditioning, and the prediction of the files a run writes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers_twin import diffusers_unet
from guidance_lab import SHA, STYLE, Lab, embedding, sample, write_guidance

from attention.guidance import prepare_style
from attention.guidance_file import load_guidance
from attention.guidance_settings import Tower

pytestmark = pytest.mark.host
TRAINING_TESTS = Path(__file__).parents[1] / "training_tests"
SIDE, FACE = 64, 6


@pytest.fixture(scope="module")
def lab(pack, small_models, comfyui) -> Lab:
    return Lab(pack, small_models, comfyui.base)


@pytest.fixture(scope="module")
def training_kit() -> SimpleNamespace:
    """The training tests' own helpers."""
    sys.path.append(str(TRAINING_TESTS))
    return SimpleNamespace(
        settings=importlib.import_module("tiny_run").settings,
        source=importlib.import_module("memory_source").MemorySource(2, face_width=FACE),
    )


@pytest.mark.parametrize("size", [(96, 64), (224, 224), (300, 411)])
def test_a_picture_gives_the_same_conditioning_in_training_code_and_node(lab, tmp_path, size):
    """transformers' tower behind the trainer's preprocessing, the host's behind the host's, in half precision."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    import_module = importlib.import_module
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=224, patch_size=32, projection_dim=12, hidden_act="quick_gelu", **options)
    )
    tower.half().float().save_pretrained(tmp_path / "tower")
    vision = import_module("comfy.clip_vision").ClipVisionModel(str(tmp_path / "tower" / "config.json"))
    missing, unexpected = vision.load_sd(tower.state_dict())
    assert not unexpected and all("position_ids" in name for name in missing)
    settings = {"towers": (Tower("ViT(32)/32@224", 12),), "style_normalisation": "unit"}
    file = write_guidance(lab.file.with_name("guidance_tower.safetensors"), **settings)
    picture = torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(2))
    hidden = torch.zeros(1, *size)
    hidden[:, size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 1

    towers = import_module("training.vision").VisionTowers(
        [import_module("training.config").TowerConfig(name="T", width=12, path=str(tmp_path / "tower"))]
    )
    trained = load_guidance(file)
    style = towers(import_module("attention.guidance_style").hide_region(picture, hidden))
    style = prepare_style(style, trained.settings.towers, "unit")
    face = torch.from_numpy(embedding(1))[None]
    expected = trained(style, face / face.norm())

    out = lab.run(
        guidance=file.name, identity=lab.identity(1), style_image=picture, clip_vision=vision, style_mask=hidden
    )
    torch.testing.assert_close(out[0][0][0], expected, atol=1e-5, rtol=1e-5)


def trained_task(kit: SimpleNamespace, unet: Any, folder: Path, train: str) -> Any:
    """A guidance task around a UNet of the host's layout, its trained weights random and exact in half precision."""
    from diffusers import DDPMScheduler

    from training.config import TrainConfig
    from training.config_io import validate
    from training.guidance_task import GuidanceTask

    options = kit.settings(
        "base", folder, method="guidance", guidance__train=train, guidance__tokens=2,
        guidance__towers=[{"name": "ViT-L/14", "width": 768}],
    )  # fmt: skip
    base = SimpleNamespace(name="twin", unet=unet, pipeline=SimpleNamespace(scheduler=DDPMScheduler()))
    torch.manual_seed(0)
    task = GuidanceTask(validate(TrainConfig, options, origin="test"), base, kit.source)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in task.trainable():
            if ".lora_B." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
            elif train == "full" and ".attn2.to_v." in name:
                weight.mul_(1.5)
            if not name.startswith("guidance."):
                weight.copy_(weight.half().float())
    return task


def saved(task: Any, folder: Path, models: Path, name: str) -> None:
    """What the run writes, put where the documentation says."""
    from training.task import RunFacts

    weights = {name: weight.detach() for name, weight in task.trainable()}
    task.save(folder, weights, RunFacts(samples_seen=8, metadata={}, base_hash="", encoder=SHA))
    places = {"guidance": "fusedid", "guidance_unet": "diffusion_models", "guidance_lora": "loras"}
    for file in folder.glob("guidance*.safetensors"):
        file.rename(models / places[file.stem] / f"{name}.safetensors")


def host_prediction(out: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, t, prediction) of the first call of the UNet in the host's sampler."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def note(_module: Any, args: tuple[Any, ...], _kwargs: Any, result: torch.Tensor) -> None:
        seen.append((args[0].clone(), args[1].clone(), result.clone()))

    hook = out[2].model.diffusion_model.register_forward_hook(note, with_kwargs=True)
    try:
        sample(out[2], out[0], out[1], steps=1, cfg=1.0)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("layout", ["sd15_small", "sdxl_tiny"])
def test_what_training_writes_predicts_the_same_in_the_host(
    lab, comfyui, small_models, training_kit, tmp_path, layout, train
):
    """Guidance file with LoRA on the base, or with the whole UNet: the host's nodes load them as they are."""
    task = trained_task(training_kit, diffusers_unet(small_models.load_unet(layout)), tmp_path, train)
    name = f"trained_{layout}_{train}"
    saved(task, tmp_path, comfyui.base / "models", name)
    base = small_models.load_unet(layout)
    if train == "lora":
        model = comfyui.node("LoraLoaderModelOnly")().load_lora_model_only(base, f"{name}.safetensors", 1.0)[0]
    else:
        model = comfyui.node("UNETLoader")().load_unet(f"{name}.safetensors", "default")[0]
    inputs = {"guidance": f"{name}.safetensors", "identity": lab.identity(1)}
    x, t, got = host_prediction(lab.styled(model=model, **inputs))
    batch = {
        "style": lab.vision.encode_image(STYLE)["image_embeds"], "keeps_style": [True],
        "face": torch.from_numpy(embedding(1))[None],
    }  # fmt: skip
    with torch.no_grad():
        expected = task.model(x, t, *task.embeddings(batch), task.added([(SIDE, SIDE)]))
    torch.testing.assert_close(got.float(), expected, atol=1e-3, rtol=1e-3)
    untrained = host_prediction(lab.styled(model=base, **inputs))[2]
    assert float((untrained.float() - expected).abs().max()) > 0.02, "the trained weights act"
