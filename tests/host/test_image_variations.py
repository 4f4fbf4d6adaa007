"""SD image-variation checkpoints (cross-attention on CLIP image embeddings) with the identity Linear.

Published as an LDM checkpoint whose `cond_stage_model` is a whole CLIP image embedder (lambdalabs/sd-image-variations),
and as a diffusers folder whose `unet/` ComfyUI's UNETLoader reads. Neither has a text encoder.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guidance_files import clip_vision_vit_l
from guidance_lab import IDENTITY_LINEAR, NO_PRIOR, STYLE, Lab, sample
from live_server import PromptError
from model_layouts import Shape, UNetLayout, unet_shapes
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.host


def image_variation_checkpoint(small_models: Any) -> Path:
    """The small SD1.5 checkpoint with an OpenAI CLIP image embedder in the text encoder's place."""
    source = small_models.checkpoint("sd15_tiny")
    path = source.with_name("image_variations.safetensors")
    if not path.exists():
        weights = {name: w for name, w in load_file(source).items() if not name.startswith("cond_stage_model.")}
        embedder = {
            "visual.class_embedding": (1024,), "visual.conv1.weight": (1024, 3, 14, 14), "visual.proj": (1024, 768),
            "visual.ln_post.weight": (1024,), "visual.ln_post.bias": (1024,), "logit_scale": (),
            "visual.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024), "text_projection": (768, 768),
        }  # fmt: skip
        weights |= {f"cond_stage_model.model.{name}": torch.zeros(shape) for name, shape in embedder.items()}
        weights |= {"cond_stage_model.mean": torch.zeros(3), "cond_stage_model.std": torch.ones(3)}
        save_file(weights, path)
    return path


def prompt(checkpoint: str, style: str, **guidance: Any) -> dict[str, Any]:
    inputs = {
        "model": ["1", 0], "guidance": IDENTITY_LINEAR, "alpha": 1.0, "text": "", "prior": NO_PRIOR, "prior_steps": 1,
        "prior_scale": 1.0, "seed": 0, "background": "mean", "clip_vision": ["2", 0], "style_image": ["3", 0],
    }  # fmt: skip
    sampler = {
        "model": ["4", 2], "positive": ["4", 0], "negative": ["4", 1], "latent_image": ["5", 0], "seed": 1, "steps": 2,
        "cfg": 3.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0,
    }  # fmt: skip
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "clip_vit_l.safetensors"}},
        "3": {"class_type": "LoadImage", "inputs": {"image": style}},
        "4": {"class_type": "HybridGuidance", "inputs": {**inputs, **guidance}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "KSampler", "inputs": sampler},
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "variation"}},
        "9": {"class_type": "PreviewAny", "inputs": {"source": ["4", 4]}},
    }


def test_an_image_variation_checkpoint_draws_by_the_style_image_over_http(server, small_models):
    checkpoint = image_variation_checkpoint(small_models).name
    clip_vision_vit_l(server.base / "models")
    pictures = []
    for number in (0, 1):
        pixels = np.random.default_rng(number).integers(0, 255, (96, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(server.base / "input" / f"variation{number}.png")
        outputs = server.queue(prompt(checkpoint, f"variation{number}.png"))["outputs"]
        picture = Image.open(io.BytesIO(server.view(outputs["8"]["images"][0])))
        pictures.append(np.asarray(picture).astype(np.float32))
        assert "style image alone" in outputs["9"]["text"][0]
    assert np.abs(pictures[0] - pictures[1]).max() > 2
    assert min(picture.std() for picture in pictures) > 1


def test_its_own_clip_reads_no_text(server, small_models):
    """The host builds a text encoder around the embedder without weights: using it is refused, not a random prompt."""
    checkpoint = image_variation_checkpoint(small_models).name
    with pytest.raises(PromptError, match=r"no text_projection.*clip_l\.safetensors"):
        server.queue(prompt(checkpoint, "variation0.png", text="a cat", clip=["1", 1]))


# 16 sites with the real widths: the host knows a diffusers SD1.5 UNet by its shapes.
REAL = UNetLayout(
    widths=(320, 640, 1280, 1280), res_blocks=2, depth_in=(1,) * 6 + (0, 0), depth_middle=1,
    depth_out=(0,) * 3 + (1,) * 9,
)  # fmt: skip


@pytest.mark.slow
def test_a_diffusers_folder_of_image_variations_gives_its_unet(comfyui, pack, small_models):
    """`unet/diffusion_pytorch_model.safetensors` by diffusers' names, as UNETLoader reads it from disk."""
    import comfy.sd
    from comfy.utils import unet_to_diffusers

    shapes = unet_shapes(REAL)
    config = {
        "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1,
    }  # fmt: skip
    names = {new: old for new, old in unet_to_diffusers(config).items() if old in shapes}
    assert set(names.values()) == set(shapes)
    weights = {new: _flat(shapes[old]) for new, old in names.items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float16})
    sites = pack.submodule("attention.sites")
    found = sites.discover_sites(model.model.diffusion_model)
    assert (len(found), sites.family_of(found), found[0].context) == (16, "sd15", 768)
    out = Lab(pack, small_models, comfyui.base).styled(model=model, guidance=IDENTITY_LINEAR)
    assert out[0][0][0].shape == (1, 1, 768)


def _flat(shape: Shape) -> torch.Tensor:
    """A tensor that takes no memory."""
    return torch.zeros((), dtype=torch.float16).expand(shape)


def test_the_variation_follows_the_image_embedding_alone(comfyui, pack, small_models):
    """Cross-attention sees the embedding as its one token: the same UNet fed by hand gives the same latent."""
    lab = Lab(pack, small_models, comfyui.base)
    model = comfyui.node("CheckpointLoaderSimple")().load_checkpoint(image_variation_checkpoint(small_models).name)[0]
    out = lab.styled(model=model, guidance=IDENTITY_LINEAR)
    token = lab.vision.encode_image(STYLE)["image_embeds"][:, None]
    by_hand = sample(model, [[token, {}]], [[torch.zeros_like(token), {}]])
    assert torch.equal(sample(out[2], out[0], out[1]), by_hand)
