"""`python -m training.positions`: cross-attention that looks at the same place, for a base that never learned to look.

An unconditional base has no text, so nothing ever trained its cross-attention, and an adapter that may change keys and
values only (METHOD 1.5) has nothing to be found by. Where a token lies is written in its features, by the convolutions'
zero padding; this command fits, by least squares on a prepared data set, queries that read the place from noisy
features, and gives half of the heads keys that read it from a thumbnail's tokens (`training/thumbnails.py`). The other
heads keep the queries of the block's self-attention. A base without attention at its finer resolutions gets it on the
way up, with an output of zero. All told the base stays the same function: under zeros as context, queries do not
matter. Training it on with thumbnails (`denoiser.condition`) then teaches it to use what it finds.

    python -m training.positions --base runs/mini_base/base --data prepared --out runs/mini_positions
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from attention.adapter import AdapterSettings

from .augment import square, to_rgb_pm1
from .base import BaseModel, load_base
from .config import ModelConfig
from .new_base import WIDTH, new_unet
from .randomness import generator
from .shards import ShardSource
from .source import Source
from .text import context_for
from .thumbnails import COLORS, PLACE, place_code
from .unet import FusedUNet, Reference
from .unet_sites import UNet, UNetSite

logger = logging.getLogger("fusedid")
RIDGE = 10.0
SCORE_GAP = 3.0
"""How much higher the score at the same place is than one token beside it: e^3 = 20 times the weight."""
TIMESTEPS = (100, 300, 500, 700, 850, 950)
Hidden = Mapping[str, Tensor]


def fitted(hidden: Tensor, wanted: Tensor) -> Tensor:
    """Ridge regression: W `[K, C]` with hidden `[F, N, C]` W^T near wanted `[F, N, K]`, or `[N, K]` for all."""
    features = hidden.float().flatten(0, 1)
    target = wanted.expand(hidden.shape[0], *wanted.shape[-2:]).flatten(0, 1)
    gram = features.T @ features + RIDGE * torch.eye(features.shape[1])
    return torch.linalg.solve(gram, features.T @ target).T


def sharpness(grid: tuple[int, int]) -> float:
    """What the product of two place codes is multiplied by for a score that falls by `SCORE_GAP` at the next token."""
    code = place_code(*grid)
    return SCORE_GAP / float(code[0] @ code[0] - code[0] @ code[1])


@torch.no_grad()
def noisy_features(base: BaseModel, fused: FusedUNet, latents: Tensor, side: int) -> Hidden:
    """What enters the queries at every site, from latents at every noise level: `[F, N, C]` by LDM path."""
    tokens, pooled = base.prompts([""])
    context = context_for(tokens, pooled, [(side, side)], side)
    schedule = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    gen, noisy = generator("positions"), []
    for timestep in TIMESTEPS:
        at = torch.full((len(latents),), timestep)
        x = schedule.add_noise(latents, torch.randn(latents.shape, generator=gen), at)
        noisy.append(fused.reference_hidden(Reference(x, context, at)))
    return {path: torch.cat([each[path] for each in noisy]) for path in noisy[0]}


def pictures(source: Source, count: int, side: int) -> Tensor:
    """The first `count` pictures, `[F, 3, side, side]` in [-1, 1]."""
    return torch.stack([to_rgb_pm1(square(source.picture(i), side)) for i in range(min(count, len(source)))])


@torch.no_grad()
def with_fine_attention(unet: UNet) -> UNet:
    """A UNet of `new_base`, with attention at every resolution on the way up; what is added changes nothing yet."""
    widths = unet.config["block_out_channels"]
    made = new_unet([width // WIDTH for width in widths], unet.config["layers_per_block"], fine=True)
    shapes = {name: weight.shape for name, weight in made.state_dict().items()}
    strange = [name for name, weight in unet.state_dict().items() if shapes.get(name) != weight.shape]
    if strange:
        raise ValueError(f"this UNet is not of `training.new_base`, which has no place for {', '.join(strange[:3])}")
    missing = set(made.load_state_dict(unet.state_dict(), strict=False).missing_keys)
    for name, weight in made.named_parameters():
        if name in missing and ".proj_out." in name:
            nn.init.zeros_(weight)
    return made.requires_grad_(False).eval()


@torch.no_grad()
def set_positions(base: BaseModel, latents: Tensor, side: int) -> None:
    """Changes the base's cross-attention queries, keys and values in place.

    Raises ValueError when a head is too narrow for the code of a place.
    """
    fused = FusedUNet(base.unet, AdapterSettings(base=base.family, reference_size=side)).eval()
    noisy = noisy_features(base, fused, latents, side)
    for entry in fused.site_table:
        _set_site(base.unet, entry, noisy[entry.path], side)


def _set_site(unet: Any, entry: UNetSite, noisy: Tensor, side: int) -> None:
    block, heads = unet.get_submodule(entry.name), entry.site.heads
    width = entry.site.channels // heads
    if width < PLACE:
        raise ValueError(f"{entry.path}: heads of {width} numbers cannot hold a place's {PLACE}")
    grid = entry.grid((side // 8, side // 8))
    gain = math.sqrt(sharpness(grid) * math.sqrt(width))
    query, key = block.attn1.to_q.weight.clone(), block.attn2.to_k.weight.clone()
    query[: heads // 2 * width] = looking(gain * fitted(noisy, place_code(*grid)), heads // 2, width)
    key[: heads // 2 * width] = 0
    key[: heads // 2 * width, :PLACE] = looking(gain * torch.eye(PLACE), heads // 2, width)
    block.attn2.to_q.weight.copy_(query)
    block.attn2.to_k.weight.copy_(key)
    value = torch.empty_like(block.attn2.to_v.weight[:, : PLACE + COLORS])
    value.normal_(std=COLORS**-0.5, generator=generator("positions", entry.path))
    block.attn2.to_v.weight[:, : PLACE + COLORS] = value


def looking(read: Tensor, heads: int, width: int) -> Tensor:
    """Weights `[heads * width, C]` of heads that each hold what `read` `[K, C]` reads, and zeros."""
    weight = read.new_zeros(heads, width, read.shape[1])
    weight[:, : len(read)] = read
    return weight.flatten(0, 1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m training.positions", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    made.add_argument("--base", required=True, help="base folder of the denoiser run")
    made.add_argument("--data", required=True, help="prepared data; its train split is read")
    made.add_argument("--out", required=True, help="folder for base/; must be new or empty")
    made.add_argument("--count", type=int, default=128, help="pictures to fit on")
    made.add_argument("--side", type=int, default=128, help="pixels of a picture")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    options = parser().parse_args(arguments)
    out = Path(options.out).expanduser()
    try:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out: {out} is not empty; give a new folder, nothing is overwritten")
        base = load_base(ModelConfig(base=options.base))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base.pipeline.register_modules(unet=with_fine_attention(base.unet))
        set_positions(base, base.encode(pictures(ShardSource(options.data), options.count, options.side)), options.side)
        base.pipeline.save_pretrained(out / "base")
    except ValueError as error:
        logger.error("%s", error)
        return 2
    logger.info("wrote %s", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
