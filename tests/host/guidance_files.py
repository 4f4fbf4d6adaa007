"""Real-format files for the guidance tests over HTTP: CLIP with projection, CLIP vision, prior, guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from guidance_lab import write_guidance
from safetensors.torch import load_file, save_file

WIDTH, LAYERS, PROJECTION = 1024, 24, 768


def clip_with_projection(small_models: Any) -> Path:
    """The small text encoder plus a random `text_projection`, for CLIPLoader."""
    source = small_models.clip()
    path = source.with_name("clip_l_projected.safetensors")
    if not path.exists():
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(768, 768, generator=generator).mul_(0.03).to(torch.float16)
        save_file({**load_file(source), "text_projection.weight": weight}, path)
    return path


def clip_vision_vit_l(models: Path) -> Path:
    """A ViT-L/14 in the layout CLIPVisionLoader detects. Only its first layer does anything: it need not be good."""
    path = models / "clip_vision" / "clip_vit_l.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        save_file(_vision_weights(), path)
    return path


def _vision_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).to(torch.float16)

    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float16)  # noqa: E731
    ones = lambda *shape: torch.ones(*shape, dtype=torch.float16)  # noqa: E731
    weights = {
        "embeddings.class_embedding": random(WIDTH),
        "embeddings.patch_embedding.weight": random(WIDTH, 3, 14, 14),
        "embeddings.position_embedding.weight": zeros(257, WIDTH),
    }
    for i in range(LAYERS):
        name, make = f"encoder.layers.{i}", random if i == 0 else zeros
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights[f"{name}.self_attn.{part}.weight"] = make(WIDTH, WIDTH)
            weights[f"{name}.self_attn.{part}.bias"] = zeros(WIDTH)
        weights[f"{name}.mlp.fc1.weight"], weights[f"{name}.mlp.fc1.bias"] = zeros(4 * WIDTH, WIDTH), zeros(4 * WIDTH)
        weights[f"{name}.mlp.fc2.weight"], weights[f"{name}.mlp.fc2.bias"] = zeros(WIDTH, 4 * WIDTH), zeros(WIDTH)
        for norm in ("layer_norm1", "layer_norm2"):
            weights[f"{name}.{norm}.weight"], weights[f"{name}.{norm}.bias"] = ones(WIDTH), zeros(WIDTH)
    for norm in ("pre_layrnorm", "post_layernorm"):
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = ones(WIDTH), zeros(WIDTH)
    named = {f"vision_model.{name}": weight for name, weight in weights.items()}
    return {**named, "visual_projection.weight": random(PROJECTION, WIDTH)}


def prior_vit_l(models: Path) -> Path:
    """A tiny random prior of ViT-L/14's width as diffusers saves it, in a folder of its own."""
    from diffusers import PriorTransformer

    folder = models / "fusedid" / "priors" / "tiny"
    if not folder.exists():
        torch.manual_seed(0)
        prior = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=PROJECTION)
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.normal_(0, 0.1)
        prior.save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


def guidance_for(models: Path, *, face_width: int, name: str = "guidance_http.safetensors") -> Path:
    """A random guidance file for ViT-L/14 and any face encoder of this width."""
    return write_guidance(models / "fusedid" / name, face_width=face_width, face_encoder="", face_encoder_name="any")
