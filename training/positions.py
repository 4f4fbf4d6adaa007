"""`python -m training.positions`: cross-attention that looks for the same place, for a base that never learned to look.

An unconditional base has no text, so nothing ever trained its cross-attention queries, and an adapter that may change
keys and values only (METHOD 1.5) has nothing to be found by. Where a token lies is written in its features, by the
convolutions' zero padding; this command fits, by least squares on a prepared data set, queries that read the place from
noisy features, and for an adapter to start from keys that read it from clean ones. Half of the heads get them; the
others keep the block's self-attention. The base stays the same function: with text that is all zeros, queries do not
matter. The starting values are zero values: an adapter begins as no adapter.

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
from torch import Tensor

from attention.adapter import AdapterSettings, Projection, save_adapter
from attention.files import read_header, write_atomic

from .augment import square, to_rgb_pm1
from .base import BaseModel, load_base
from .base_files import comfy_checkpoint
from .config import ModelConfig
from .denoiser_task import FILE_NAME as CHECKPOINT
from .randomness import generator
from .shards import ShardSource
from .source import Source
from .text import context_for
from .unet import FusedUNet, Reference
from .unet_sites import UNetSite

logger = logging.getLogger("fusedid")
FREQUENCIES = 4
RIDGE = 10.0
SHARPNESS = 1.5
"""Score at the same place minus that one token beside it is twice this: e^3 = 20 times the weight."""
TIMESTEPS = (100, 300, 500, 700, 850, 950)
Hidden = Mapping[str, Tensor]


def place_code(height: int, width: int) -> Tensor:
    """Cosines and sines of row and column, `[height * width, 4 * FREQUENCIES]`: near places have like codes.

    A grid of n tokens spans half of the longest period, so that its ends differ most.
    """
    codes = []
    for index, size in ((0, height), (1, width)):
        places = torch.arange(height * width)
        at = (places // width if index == 0 else places % width).float()
        angles = at[:, None] * torch.arange(1, FREQUENCIES + 1) * math.pi / size
        codes += [angles.cos(), angles.sin()]
    return torch.cat(codes, dim=1)


def fitted(hidden: Tensor, code: Tensor) -> Tensor:
    """Ridge regression: W `[K, C]` with hidden `[F, N, C]` W^T near code `[N, K]` for every picture."""
    features = hidden.float().flatten(0, 1)
    wanted = code.repeat(hidden.shape[0], 1)
    gram = features.T @ features + RIDGE * torch.eye(features.shape[1])
    return torch.linalg.solve(gram, features.T @ wanted).T


def looking_weights(
    own_query: Tensor, own_key: Tensor, read_noisy: Tensor, read_clean: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """(queries, keys) `[C, C]`: the first half of the heads compares places, the others stay as they are.

    The scores are those of `SHARPNESS` after the attention's own division by the root of the head's width.
    """
    width = own_query.shape[0] // heads
    gain = math.sqrt(SHARPNESS * math.sqrt(width))
    query, key = own_query.clone(), own_key.clone()
    for head in range(heads // 2):
        rows = slice(head * width, (head + 1) * width)
        for weight, read in ((query, read_noisy), (key, read_clean)):
            weight[rows] = 0
            weight[rows][: len(read)] = gain * read
    return query, key


@torch.no_grad()
def features(base: BaseModel, fused: FusedUNet, source: Source, count: int, side: int) -> tuple[Hidden, Hidden]:
    """What enters the queries at every site, from noisy and from clean pictures: `[F, N, C]` by LDM path."""
    pictures = [to_rgb_pm1(square(source.picture(i), side)) for i in range(min(count, len(source)))]
    latents = base.encode(torch.stack(pictures))
    tokens, pooled = base.prompts([""])
    context = context_for(tokens, pooled, [(side, side)], side)
    schedule = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    gen, noisy = generator("positions"), []
    for timestep in TIMESTEPS:
        at = torch.full((len(latents),), timestep)
        x = schedule.add_noise(latents, torch.randn(latents.shape, generator=gen), at)
        noisy.append(fused.reference_hidden(Reference(x, context, at)))
    clean = fused.reference_hidden(Reference(latents, context))
    return {path: torch.cat([each[path] for each in noisy]) for path in clean}, clean


def set_positions(base: BaseModel, source: Source, *, count: int, side: int) -> dict[str, Projection]:
    """Changes the base's cross-attention queries in place; returns keys and (zero) values for an adapter to start from.

    Raises ValueError when a head is too narrow for the code of a place.
    """
    fused = FusedUNet(base.unet, AdapterSettings(base=base.family, reference_size=side)).eval()
    noisy, clean = features(base, fused, source, count, side)
    return {entry.path: _set_site(base.unet, entry, noisy, clean, side) for entry in fused.site_table}


def _set_site(unet: Any, entry: UNetSite, noisy: Hidden, clean: Hidden, side: int) -> Projection:
    block = unet.get_submodule(entry.name)
    width = entry.site.channels // entry.site.heads
    if width < 4 * FREQUENCIES:
        raise ValueError(f"{entry.path}: heads of {width} numbers cannot hold a place's {4 * FREQUENCIES}")
    code = place_code(*entry.grid((side // 8, side // 8)))
    query, key = looking_weights(
        block.attn1.to_q.weight.detach(),
        block.attn1.to_k.weight.detach(),
        fitted(noisy[entry.path], code),
        fitted(clean[entry.path], code),
        entry.site.heads,
    )
    block.attn2.to_q.weight.data.copy_(query)
    return Projection(key, torch.zeros_like(key))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m training.positions", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    made.add_argument("--base", required=True, help="base folder of the denoiser run")
    made.add_argument("--data", required=True, help="prepared data; its train split is read")
    made.add_argument(
        "--out", required=True, help="folder for base/, its checkpoint and start.safetensors; must be new or empty"
    )
    made.add_argument("--count", type=int, default=128, help="pictures to fit on")
    made.add_argument("--side", type=int, default=128, help="pixels of picture and reference")
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
        start = set_positions(base, ShardSource(options.data), count=options.count, side=options.side)
        out.mkdir(parents=True, exist_ok=True)
        base.pipeline.save_pretrained(out / "base")
        made_by = Path(options.base).expanduser().parent / CHECKPOINT
        metadata = read_header(made_by).metadata if made_by.is_file() else {"format": "pt"}
        write_atomic(out / CHECKPOINT, comfy_checkpoint(base.unet, base.vae), metadata)
        save_adapter(out / "start.safetensors", start, AdapterSettings(base=base.family, reference_size=options.side))
    except ValueError as error:
        logger.error("%s", error)
        return 2
    logger.info("wrote %s", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
