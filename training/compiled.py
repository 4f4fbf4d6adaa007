"""torch.compile of the transformer blocks, one compilation for all blocks that are alike (regional)."""

from __future__ import annotations

import torch

from .unet_sites import UNet

MOST_VARIANTS = 64
"""Widths (3) x kinds of call (reference pass, with faces, without) x with or without gradient x memory layouts.

torch allows 8 by default and then runs the rest uncompiled, without an error.
"""


def compile_blocks(unet: UNet, **options: object) -> None:
    """Compiles every transformer block in place; `options` go to `torch.compile`."""
    limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    torch._dynamo.config.recompile_limit = limit
    unet.compile_repeated_blocks(**options)
