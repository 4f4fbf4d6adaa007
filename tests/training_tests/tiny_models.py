"""Random base models in diffusers' folder layout, small enough that a training step takes milliseconds."""

from __future__ import annotations

import string
from pathlib import Path

import torch

CONTEXT = 64
WORDS = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]


def tiny_unet(kind: str = "sd15", *, layers_per_block: int = 1, seed: int = 0, widths: tuple[int, int] = (32, 64)):
    """A UNet2DConditionModel with 4 (`sd15`) or 9 (`sdxl`) sites of 32 and 64 channels."""
    from diffusers import UNet2DConditionModel

    extra = {}
    if kind == "sdxl":
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": CONTEXT + 6 * 8,
            "transformer_layers_per_block": [1, 2],
            "use_linear_projection": True,
        }
    torch.manual_seed(seed)
    two_levels = kind == "sdxl"
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        cross_attention_dim=2 * CONTEXT if kind == "sdxl" else CONTEXT,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D" if two_levels else "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D" if two_levels else "UpBlock2D", "CrossAttnUpBlock2D"),
        **extra,
    ).eval()


def tiny_vae(seed: int = 0):
    """An AutoencoderKL with 8 pixels per latent and 4 latent channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.18215,
    ).eval()


def tiny_text(*, projection: bool = False, seed: int = 0, width: int = CONTEXT):
    """A CLIP text encoder over single letters, and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=len(WORDS) - 2,
        eos_token_id=len(WORDS) - 1,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, merges=[], model_max_length=77)
    return model, tokenizer


def write_base(
    folder: Path, kind: str = "sd15", *, unet: object = None, width: int = CONTEXT, **options: object
) -> Path:
    """A whole pipeline folder, as a hub checkout of SD1.5 or SDXL looks.

    `options` describe its UNet; or a `unet` is given, whose (first) text encoder has `width`.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    scheduler = EulerDiscreteScheduler(**schedule)
    text, tokenizer = tiny_text(width=width)
    unet, vae = unet or tiny_unet(kind, **options), tiny_vae()
    if kind == "sd15":
        pipeline = StableDiffusionPipeline(
            vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
    else:
        text_2, tokenizer_2 = tiny_text(projection=True, seed=1)
        pipeline = StableDiffusionXLPipeline(vae, text, text_2, tokenizer, tokenizer_2, unet, scheduler)
    pipeline.save_pretrained(folder)
    return folder
