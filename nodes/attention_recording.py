"""What FusedIDRecordAttention hands on: filled by the layers while sampling, read by FusedIDAttentionMap.

Legend: I identities, B pictures of the batch, H W latent pixels, h w token grid of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .host.prompts import Area


@dataclass(frozen=True, eq=False)
class LayerShares:
    """Shares `[rows, h*w, I]` of one layer in one call, for the part of the latent that a prompt shows.

    run: the number of the plan they belong to. names: of the people, empty where somebody has none. full_hw: of the
    whole latent. area: the part shown, None for all. num_pictures: rows are a multiple of it.
    """

    run: int
    names: tuple[str, ...]
    shares: Tensor
    grid: tuple[int, int]
    full_hw: tuple[int, int]
    area: Area | None
    num_pictures: int


class AttentionRecording:
    """The mean over layers and steps of the last sampling run; holds one map per person, however long the run.

    Several patches in one MODEL are recorded side by side: their people follow each other.
    """

    def __init__(self) -> None:
        self._sums: dict[int, tuple[tuple[str, ...], Tensor, Tensor]] = {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> AttentionRecording:
        return self  # clones of a MODEL write into the recording that the map node holds

    def clear(self) -> None:
        """Forgets the run before."""
        self._sums.clear()

    def add(self, layer: LayerShares) -> None:
        """Adds a layer's shares, every latent pixel with those of the query it belongs to."""
        size = layer.full_hw if layer.area is None else layer.area[:2]
        top, left = (0, 0) if layer.area is None else layer.area[2:]
        shares = layer.shares.float().unflatten(0, (-1, layer.num_pictures)).mean(0)  # packs repeat rows per region
        maps = F.interpolate(shares.transpose(1, 2).unflatten(2, layer.grid), size=size, mode="nearest-exact")
        wanted = (maps.shape[1], maps.shape[0], *layer.full_hw)
        found = self._sums.get(layer.run)
        if found is None or tuple(found[1].shape) != wanted:
            found = (layer.names, maps.new_zeros(wanted), maps.new_zeros(layer.full_hw))
            self._sums[layer.run] = found
        place = (..., slice(top, top + size[0]), slice(left, left + size[1]))
        found[1][place] += maps.transpose(0, 1)
        found[2][place] += 1

    def people(self) -> list[tuple[str, Tensor]]:
        """Per person the name and the mean share `[B, H, W]` in [0, 1], on the CPU.

        Raises ValueError when nothing was recorded.
        """
        if not self._sums:
            raise ValueError(
                "the recording is empty: no face acted in a sampled step. The sampler must use the model that comes "
                "out of Record Attention, that model must also pass through FusedIDAttentionPatch with strength above "
                "0, and both windows (start_percent, end_percent) must share a step. If everything is so, change the "
                "seed, so that the sampler runs again"
            )
        sums = [self._sums[run] for run in sorted(self._sums)]
        if len({tuple(total.shape[1:]) for _, total, _ in sums}) > 1:
            raise ValueError("two patches recorded pictures of different sizes; use one Record Attention for each")
        return [
            (name, share.cpu())
            for names, total, count in sums
            for name, share in zip(names, total / count.clamp_min(1), strict=True)
        ]
