"""`python -m training.adapter_start`: what an adapter begins with on a base that was conditioned on thumbnails.

Such a base knows what to do with tokens of place and colour (`training/thumbnails.py`). Both can be read from the
features of a clean reference; R is that reading, by least squares on a prepared data set. Keys and values W_k R and
W_v R then say about a reference what a thumbnail of it would say, and training goes on from there (METHOD 1.5).

    python -m training.adapter_start --base runs/mini_thumbnails/base --data prepared --out runs/mini_start.safetensors
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attention.adapter import AdapterSettings, Projection, save_adapter

from .base import BaseModel, load_base
from .config import ModelConfig
from .positions import fitted, pictures
from .shards import ShardSource
from .text import context_for
from .thumbnails import PATCH, thumbnail_tokens
from .unet import FusedUNet, Reference

logger = logging.getLogger("fusedid")


@torch.no_grad()
def adapter_start(base: BaseModel, pixels: Tensor) -> dict[str, Projection]:
    """Keys and values `[C, C]` by LDM path, read from pictures `[F, 3, side, side]` in [-1, 1]."""
    side = pixels.shape[-1]
    fused = FusedUNet(base.unet, AdapterSettings(base=base.family, reference_size=side)).eval()
    tokens, pooled = base.prompts([""])
    clean = fused.reference_hidden(Reference(base.encode(pixels), context_for(tokens, pooled, [(side, side)], side)))
    found = {}
    for entry in fused.site_table:
        grid = entry.grid((side // 8, side // 8))
        wanted = thumbnail_tokens(pixels, [PATCH * grid[0]] * len(pixels), entry.site.context, grid)
        read = fitted(clean[entry.path], wanted)
        block = base.unet.get_submodule(entry.name)
        found[entry.path] = Projection(block.attn2.to_k.weight @ read, block.attn2.to_v.weight @ read)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m training.adapter_start", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    made.add_argument("--base", required=True, help="base folder of the denoiser run with thumbnails")
    made.add_argument("--data", required=True, help="prepared data; its train split is read")
    made.add_argument("--out", required=True, help="adapter file to write; must not exist")
    made.add_argument("--count", type=int, default=256, help="pictures to fit on")
    made.add_argument("--side", type=int, default=128, help="pixels of the reference")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    options = parser().parse_args(arguments)
    out = Path(options.out).expanduser()
    try:
        if out.exists():
            raise ValueError(f"--out: {out} exists; nothing is overwritten")
        base = load_base(ModelConfig(base=options.base))
        start = adapter_start(base, pictures(ShardSource(options.data), options.count, options.side))
        out.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(out, start, AdapterSettings(base=base.family, reference_size=options.side))
    except ValueError as error:
        logger.error("%s", error)
        return 2
    logger.info("wrote %s", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
