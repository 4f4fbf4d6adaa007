"""In which form features are kept between steps: in the model's precision or in 8 bits, beside the model or in RAM.

Legend: N tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache import LayerFeatures, num_bytes
from .training_free import Statistics

PRECISIONS = ("model", "fp8")
PLACES = ("model", "cpu")
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
SMALLEST_SCALE = 1e-30  # of a channel that is the same at every token


@dataclass(frozen=True)
class Storage:
    """precision: `model` (what the model computes in) or `fp8`. place: `model` (its device) or `cpu`."""

    precision: str = "model"
    place: str = "model"


AS_COMPUTED = Storage()


@dataclass(frozen=True, eq=False)
class Scale:
    """What 8-bit numbers `[1, N, C]` stand for: numbers * size + mean, both `[1, 1, C]` in float32."""

    size: Tensor
    mean: Tensor


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """One layer's features as they are kept. dtype: of the numbers before. scales: of key and value in 8 bits."""

    features: LayerFeatures
    dtype: torch.dtype
    scales: tuple[Scale, Scale] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that takes memory."""
        return (*self.features.tensors, *(t for scale in self.scales or () for t in (scale.size, scale.mean)))

    @property
    def device(self) -> torch.device:
        """Where they are kept."""
        return self.features.key.device

    def to(self, device: torch.device, *, pinned: bool = False) -> StoredLayer:
        """The same elsewhere; from pinned memory to a GPU without waiting."""

        def moved(tensor: Tensor) -> Tensor:
            there = tensor.to(device, non_blocking=device.type != "cpu")
            return there.pin_memory() if pinned else there

        old = self.features
        features = replace(
            old,
            key=moved(old.key),
            value=moved(old.value),
            statistics=None if old.statistics is None else Statistics(*map(moved, old.statistics.tensors)),
            log_size=None if old.log_size is None else moved(old.log_size),
        )
        if self.scales is None:
            return replace(self, features=features)
        key, value = (Scale(moved(scale.size), moved(scale.mean)) for scale in self.scales)
        return replace(self, features=features, scales=(key, value))

    def expanded(self) -> LayerFeatures:
        """As the attention takes them."""
        if self.scales is None:
            return self.features
        key, value = (
            (numbers.float() * scale.size + scale.mean).to(self.dtype)
            for numbers, scale in zip((self.features.key, self.features.value), self.scales)
        )
        return replace(self.features, key=key, value=value)


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """All sites of one reference as they are kept: LDM path -> layer."""

    layers: dict[str, StoredLayer]

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return num_bytes(t for layer in self.layers.values() for t in layer.tensors)


def stored(layer: LayerFeatures, storage: Storage) -> StoredLayer:
    """A layer's features in the form in which they are kept."""
    found = StoredLayer(layer, layer.key.dtype)
    if storage.precision == "fp8":
        (key, key_scale), (value, value_scale) = _in_8_bits(layer.key), _in_8_bits(layer.value)
        found = replace(found, features=replace(layer, key=key, value=value), scales=(key_scale, value_scale))
    if storage.place == "cpu":
        found = found.to(torch.device("cpu"), pinned=torch.cuda.is_available())
    return found


def layer_bytes(num_tokens: int, channels: int, itemsize: int, storage: Storage) -> int:
    """What keys and values of so many tokens take."""
    if storage.precision == "fp8":
        return 2 * (num_tokens * channels + 2 * 4 * channels)
    return 2 * num_tokens * channels * itemsize


def require_fp8(device: torch.device) -> None:
    """Raises ValueError when the device cannot hold 8-bit floats."""
    try:
        torch.zeros(1, device=device).to(FP8).float()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"cache_precision is 'fp8', and the device {device} has no 8-bit floats. Choose 'model'"
        ) from error


def _in_8_bits(x: Tensor) -> tuple[Tensor, Scale]:
    """`[1, N, C]`: what all tokens have in common is kept exactly, and every channel uses the whole range."""
    x = x.float()
    mean = x.mean(1, keepdim=True)
    size = ((x - mean).abs().amax(1, keepdim=True) / FP8_LARGEST).clamp_min(SMALLEST_SCALE)
    return ((x - mean) / size).to(FP8), Scale(size, mean)
