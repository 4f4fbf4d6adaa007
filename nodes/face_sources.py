"""From what the reference pass saw at a layer to keys and values: by an adapter, or by the model's own projections."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..attention.adapter import FusionAdapter
from ..attention.cache import LayerFeatures
from ..attention.grid import LATENT_SCALE, grid_at_level
from ..attention.sites import Site
from ..attention.training_free import statistics


@dataclass(frozen=True, eq=False)
class Seen:
    """One layer during the reference pass, `[1, N, C]` each.

    normed: input of the cross-attention (h_f of METHOD 1.2). query, key, value: of the self-attention.
    """

    normed: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


class FaceSource(Protocol):
    """attention: the attention layer whose states the pass keeps. fingerprint: what the features depend on, in text."""

    attention: str
    fingerprint: str

    def features(self, site: Site, block: nn.Module, seen: Seen) -> LayerFeatures:
        """Keys and values at one site. block: the site's transformer block, loaded."""
        ...


class AdapterSource(nn.Module):
    """A fusion adapter: K_f = W_kf h_f, V_f = W_vf h_f. A module, so that the host can count, move and free it."""

    attention = "attn2"

    def __init__(self, adapter: FusionAdapter) -> None:
        super().__init__()
        self.fingerprint = adapter.fingerprint
        self._places = {path: index for index, path in enumerate(adapter.projections)}
        weights = [w for p in adapter.projections.values() for w in (p.key, p.value)]
        self._weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)
        self._side = adapter.settings.reference_size // LATENT_SCALE

    def features(self, site: Site, block: nn.Module, seen: Seen) -> LayerFeatures:
        """See FaceSource."""
        assert seen.normed is not None
        h, place = seen.normed, 2 * self._places[site.path]
        key, value = (h @ self._weights[i].to(h).T for i in (place, place + 1))
        return LayerFeatures(key, value, _tokens(self._side, site))


class OwnProjections:
    """Fusion without weights, experimental: the layer's own self-attention projections in place of W_kf and W_vf.

    size: the model's native side in pixels, the length that `balanced` calls trained.
    """

    attention = "attn2"
    fingerprint = "attn1 projections"

    def __init__(self, size: int) -> None:
        self._side = size // LATENT_SCALE

    def features(self, site: Site, block: Any, seen: Seen) -> LayerFeatures:
        """See FaceSource."""
        h = seen.normed
        return LayerFeatures(block.attn1.to_k(h), block.attn1.to_v(h), _tokens(self._side, site))


class SharedSelfAttention:
    """Training-free: the reference's self-attention keys and values, and its statistics for AdaIN. size: as above."""

    attention = "attn1"
    fingerprint = "attn1 states"

    def __init__(self, size: int) -> None:
        self._side = size // LATENT_SCALE

    def features(self, site: Site, block: nn.Module, seen: Seen) -> LayerFeatures:
        """See FaceSource."""
        assert seen.query is not None and seen.key is not None and seen.value is not None
        tokens = _tokens(self._side, site)
        return LayerFeatures(seen.key, seen.value, tokens, statistics(seen.query, seen.key))


def tensor_fingerprint(latent: Tensor) -> str:
    """sha256 of a tensor's content."""
    return hashlib.sha256(latent.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()


def _tokens(side: int, site: Site) -> int:
    rows, columns = grid_at_level((side, side), site.level)
    return rows * columns
