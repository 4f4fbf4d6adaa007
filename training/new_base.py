"""`python -m training.new_base --out models/mini`: an untrained SD1.5-layout model of any size, as a diffusers folder.

For models made from nothing: a UNet that ComfyUI takes for SD1.5 (320 channels, 768-wide context), an autoencoder in
TAESD's layout and a text encoder that says nothing, so that every prompt is the same zeros: the model is unconditional.
"""

from __future__ import annotations

import argparse
import logging
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("fusedid")
CONTEXT, TEXT_TOKENS = 768, 77
WIDTH = 320
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
WORDS = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]


def new_unet(multipliers: Sequence[int] = (1, 1), layers: int = 1, *, fine: bool = False) -> Any:
    """A UNet of widths 320 * multipliers with attention at its lowest resolution and no middle block.

    fine: attention at every resolution on the way up too, where a face's details are put in.
    """
    from diffusers import UNet2DConditionModel

    levels = len(multipliers)
    others = "CrossAttnUpBlock2D" if fine else "UpBlock2D"
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tuple(WIDTH * factor for factor in multipliers),
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) + (others,) * (levels - 1),
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
    )


def silent_text_encoder() -> tuple[Any, Any]:
    """(encoder, tokenizer): CLIP text classes whose output is zeros `[B, 77, 768]` for every prompt."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=CONTEXT,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=12,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=len(WORDS) - 2,
        eos_token_id=len(WORDS) - 1,
    )
    encoder = CLIPTextModel(config).eval()
    for name, weight in encoder.named_parameters():
        if "final_layer_norm" in name:
            nn.init.zeros_(weight)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    return encoder, CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_TOKENS)


def new_pipeline(unet: Any, vae: Any, *, prediction: str = "v_prediction") -> Any:
    """diffusers' pipeline around a UNet and an autoencoder, with the silent text encoder."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    text, tokenizer = silent_text_encoder()
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction, clip_sample=False)
    return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m training.new_base", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    made.add_argument("--out", required=True, help="folder to write; must be new or empty")
    made.add_argument("--multipliers", type=int, nargs="+", default=[1, 1], help="width of every level in units of 320")
    made.add_argument("--layers", type=int, default=1, help="residual blocks per level")
    made.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="v_prediction")
    made.add_argument("--seed", type=int, default=0)
    return made


def write_new_base(options: argparse.Namespace) -> Path:
    """Writes the folder. Raises ValueError when it is not empty or the sizes make no model."""
    from diffusers import AutoencoderTiny

    out = Path(options.out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty; give a new folder, nothing is overwritten")
    if min(options.multipliers) < 1 or options.layers < 1:
        raise ValueError(f"--multipliers {options.multipliers} and --layers {options.layers} must all be at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        unet = new_unet(options.multipliers, options.layers)
        pipeline = new_pipeline(unet, AutoencoderTiny(scaling_factor=1.0), prediction=options.prediction)
    pipeline.save_pretrained(out)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        logger.info("wrote %s", write_new_base(parser().parse_args(arguments)))
    except ValueError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
