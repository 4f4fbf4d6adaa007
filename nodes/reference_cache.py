"""Reference features of one UNet call: from the cache, or from a reference pass (promise 6)."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import torch

from ..attention.cache import ReferenceCache
from ..attention.storage import Storage
from .fusion_plan import Features, FusionPlan, ReferencePass
from .host.model_call import ModelCall
from .host.weights import is_gone, weights_name
from .reference import ReferenceText, reference_features

BUDGET_MIB = 2048
CACHE: ReferenceCache[Features] = ReferenceCache(BUDGET_MIB)
_numbers = itertools.count()
_model_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class FeatureKey(NamedTuple):
    """Everything that the features of one reference depend on. level: of noise, None for a clean reference."""

    model: int
    weights: str
    dtype: str
    device: str
    source: str
    latent: str
    text: str
    share: float
    storage: Storage
    level: float | None

    @property
    def on_device(self) -> bool:
        """Whether the features take memory of the model's device."""
        return self.storage.place == "model" or self.device == "cpu"


Held = dict[FeatureKey, Features]
"""The features of the run in progress, whatever the cache lets go of meanwhile."""


def call_features(
    plan: FusionPlan, faces: ReferencePass, call: ModelCall, text: ReferenceText, held: Held
) -> tuple[Features, ...]:
    """Features of every reference with one text, in the order of `plan.shown`; `held` keeps them."""
    base, sigma = call.base, call.sigma.flatten()[:1] if faces.matched else None
    level = None if sigma is None else float(sigma)
    if level is not None:  # another step's features are never asked for again
        for key in [key for key in held if key.level != level]:
            del held[key]
    device = call.x.device
    model = (model_number(base), weights_name(base), str(compute_dtype(base)), str(device), faces.source.fingerprint)
    how = (text.fingerprint, faces.share, faces.storage, level)
    keys = [FeatureKey(*model, one.fingerprint, *how) for one in faces.latents]
    missing = {key: one for key, one in zip(keys, faces.latents) if key not in held}
    progress = comfy.utils.ProgressBar(len(missing)) if len(missing) > 1 and sigma is None else None
    for key, one in missing.items():
        comfy.model_management.throw_exception_if_processing_interrupted()

        def compute(one: Any = one) -> Features:
            return reference_features(
                base, one, text, faces.source, plan.sites, sigma=sigma, device=device, options=call.options,
                share=faces.share, storage=faces.storage,
            )  # fmt: skip

        held[key] = compute() if sigma is not None else _cached(key, compute)
        if progress is not None:
            progress.update(1)
    return tuple(held[key] for key in keys)


def _cached(key: FeatureKey, compute: Any) -> Features:
    CACHE.drop(lambda kept: is_gone(kept.weights))  # what can never be asked for again takes no memory
    return CACHE.get(key, compute)


def compute_dtype(base: Any) -> torch.dtype:
    """What the model's layers compute in, whatever its weights are stored as."""
    return base.manual_cast_dtype if base.manual_cast_dtype is not None else base.get_dtype()


def model_number(base: Any) -> int:
    """A number that names a loaded model for as long as it lives; its cached features go with it."""
    if base not in _model_numbers:
        number = next(_numbers)
        _model_numbers[base] = number
        # Not at the interpreter's exit, when what it would need may be gone before it.
        weakref.finalize(base, CACHE.drop, lambda key: key.model == number).atexit = False
    return _model_numbers[base]


def held_bytes(number: int) -> int:
    """What a model's features take of its device."""
    return CACHE.num_bytes(lambda key: key.model == number and key.on_device)


def free_features(number: int) -> None:
    """Forgets what a model that leaves its device has there. Features in RAM stay as long as its weights do."""
    CACHE.drop(lambda key: key.model == number and key.on_device)
