"""The cached reference features of a model, in the form the host counts and frees: a patcher beside the model's own.

Weights are not the only thing on the device that belongs to a model. As an additional model of a patched MODEL, the
store is loaded with it, counts what the features take, and drops them when the host wants the memory back.
"""

from __future__ import annotations

import weakref
from typing import Any

import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from torch import nn

from .reference_cache import free_features, held_bytes, model_number

_stores: weakref.WeakKeyDictionary[Any, FeatureStore] = weakref.WeakKeyDictionary()


class FeatureStore(ModelPatcher):
    """One per model. It holds no tensors itself: size and release are the cache's."""

    def __init__(self, base: Any) -> None:
        self._number = model_number(base)  # first: the host asks for the size while it constructs
        self._expected = 0
        super().__init__(ReferenceFeaturesOnDevice(), management.get_torch_device(), management.unet_offload_device())

    def expect(self, num_bytes: int) -> None:
        """What the next run will hold, so that the host makes room before the first reference pass."""
        self._expected = num_bytes

    def clone(self, *_: Any, **__: Any) -> FeatureStore:
        """The store itself: clones of a MODEL share its features."""
        return self

    def model_size(self) -> int:
        """Bytes held on the device, or about to be."""
        return max(held_bytes(self._number), self._expected)

    def loaded_size(self) -> int:
        """The same: features in RAM are not loaded, they pass through layer by layer."""
        return self.model_size()

    def detach(self, unpatch_all: bool = True) -> Any:
        """The host takes the memory back."""
        if unpatch_all:
            free_features(self._number)
        return super().detach(unpatch_all)

    def __del__(self) -> None:
        """The host's patchers give back memory here, with modules that are gone at the interpreter's exit."""


class ReferenceFeaturesOnDevice(nn.Module):
    """What the host moves between devices for us: nothing."""


def feature_store(base: Any) -> FeatureStore:
    """The store of a model (the host's BaseModel)."""
    if base not in _stores:
        _stores[base] = FeatureStore(base)
    return _stores[base]
