"""CLIP vision towers for the style image: transformers folders or open_clip models (METHOD 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.guidance_style import CLIP_MEAN_RGB

from .config import TowerConfig

CLIP_STD_RGB = (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = "open_clip:"


class VisionTowers(nn.Module):
    """The towers of a guidance file, frozen, in order."""

    def __init__(self, towers: Sequence[TowerConfig]) -> None:
        super().__init__()
        self.towers = tuple(towers)
        loaded = [_load(tower) for tower in towers]
        self.models = nn.ModuleList([model.requires_grad_(False).eval() for model, _, _ in loaded])
        self.sizes = [size for _, size, _ in loaded]
        self._run: list[Callable[[nn.Module, Tensor], Tensor]] = [run for _, _, run in loaded]

    @torch.no_grad()
    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Images `[B, H, W, 3]` in [0, 1] -> raw projected embeddings side by side `[B, S]`.

        Raises ValueError when a tower gives another width than the configuration says.
        """
        columns = []
        for tower, model, size, run in zip(self.towers, self.models, self.sizes, self._run):
            column = run(model, clip_pixels(images_BHWC, size)).float()
            if column.shape[1] != tower.width:
                raise ValueError(
                    f"guidance.towers: {tower.name} gives {column.shape[1]} numbers, its width says {tower.width}"
                )
            columns.append(column)
        return torch.cat(columns, dim=1)


def clip_pixels(images_BHWC: Tensor, size: int) -> Tensor:
    """CLIP's preprocessing: short side to `size` (bicubic), centre square, 8 bits, normalised; `[B, 3, size, size]`.

    Step by step what the node's host does, so that a picture has one embedding in both.
    """
    x = images_BHWC.permute(0, 3, 1, 2).float()
    height, width = x.shape[2:]
    scale = size / min(height, width)
    new = (max(size, round(height * scale)), max(size, round(width * scale)))
    if new != (height, width):
        x = F.interpolate(x, size=new, mode="bicubic", antialias=True)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    x = x[:, :, top : top + size, left : left + size]
    x = (255.0 * x).clamp(0, 255).round() / 255.0
    mean, std = (x.new_tensor(values)[:, None, None] for values in (CLIP_MEAN_RGB, CLIP_STD_RGB))
    return (x - mean) / std


def _load(tower: TowerConfig) -> tuple[nn.Module, int, Callable[[Any, Tensor], Tensor]]:
    assert tower.path is not None, "cached towers need no model"
    if tower.path.startswith(OPEN_CLIP):
        return _load_open_clip(tower, tower.path.removeprefix(OPEN_CLIP))
    from transformers import CLIPVisionModelWithProjection

    try:
        model = CLIPVisionModelWithProjection.from_pretrained(tower.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"guidance.towers: {tower.name}: {tower.path} is no transformers CLIP vision folder ({error})"
        ) from error
    return model, _side(model.config.image_size), lambda m, pixels: m(pixels).image_embeds


def _load_open_clip(tower: TowerConfig, name: str) -> tuple[nn.Module, int, Callable[[Any, Tensor], Tensor]]:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(f"guidance.towers: {tower.name} needs open_clip: pip install open_clip_torch") from error
    architecture, _, weights = name.partition("/")
    if not weights:
        raise ValueError(f"guidance.towers: {tower.path} needs the form open_clip:<model>/<weights>")
    model = open_clip.create_model(architecture, pretrained=weights)
    return model.visual, _side(model.visual.image_size), lambda m, pixels: m(pixels)


def _side(size: Any) -> int:
    return size if isinstance(size, int) else int(size[0])
