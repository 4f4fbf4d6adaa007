"""Reference features for one UNet call: from the cache, or from a reference pass (promise 6)."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..attention.cache import ReferenceCache, ReferenceFeatures
from ..attention.prefetch import Prefetch
from ..attention.storage import AS_COMPUTED, Storage
from .face_sources import tensor_fingerprint
from .fusion_plan import Features, FusionPlan, GivenFaces, ReferencePass, Run
from .reference import OVERRIDE, POOLED_WIDTH, ReferenceLatent, ReferenceText, reference_features

Options = dict[str, Any]
BUDGET_MIB = 2048
CACHE: ReferenceCache[Features] = ReferenceCache(BUDGET_MIB)
_numbers = itertools.count()
_model_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class FeatureKey(NamedTuple):
    """Everything that the features of one reference depend on. level: of noise, None for a clean reference."""

    model: int
    patches: str
    hooks: tuple[Any, ...]
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


def call_features(
    plan: FusionPlan, base: Any, x: Tensor, t: Tensor, context: Tensor | None, y: Tensor | None, options: Options
) -> Run:
    """Features for one UNet call with x `[B, 4, h, w]`: on its device, or on their way there."""
    faces = plan.faces
    if isinstance(faces, GivenFaces):
        dtype = compute_dtype(base)
        placed = tuple(_placed(plan, one, x.device, dtype) for one in faces.features)
        return Run(placed, None if faces.negative is None else _placed(plan, faces.negative, x.device, dtype))
    text = _text(plan, faces, context, y, options)
    sigma = t.flatten()[:1] if faces.matched else None
    level = None if sigma is None else float(sigma)
    if level is not None:  # another step's features are never asked for again
        for key in [key for key in plan.kept if key.level != level]:
            del plan.kept[key]
    model = (model_number(base), *_weights_state(base), str(compute_dtype(base)), str(x.device))
    how = (faces.share, faces.storage, level)
    keys = [
        FeatureKey(*model, faces.source.fingerprint, one.fingerprint, text.fingerprint, *how) for one in faces.latents
    ]
    _run_missing(plan, faces, base, keys, text, sigma, x.device, options)
    found: Any = tuple(plan.kept[key] for key in keys)
    if faces.storage == AS_COMPUTED:
        return Run(found)
    order = [site.path for site in plan.sites if site.path in plan.active]
    return Run((), ahead=Prefetch(found, order, x.device))


def _run_missing(
    plan: FusionPlan,
    faces: ReferencePass,
    base: Any,
    keys: list[FeatureKey],
    text: ReferenceText,
    sigma: Tensor | None,
    device: torch.device,
    options: Options,
) -> None:
    missing = {key: one for key, one in zip(keys, faces.latents) if key not in plan.kept}
    progress = comfy.utils.ProgressBar(len(missing)) if len(missing) > 1 and sigma is None else None
    for key, one in missing.items():
        comfy.model_management.throw_exception_if_processing_interrupted()

        def compute(one: ReferenceLatent = one) -> Features:
            return reference_features(
                base, one, text, faces.source, plan.sites, sigma=sigma, device=device, override=options.get(OVERRIDE),
                share=faces.share, storage=faces.storage,
            )  # fmt: skip

        plan.kept[key] = compute() if sigma is not None else CACHE.get(key, compute)
        if progress is not None:
            progress.update(1)


def compute_dtype(base: Any) -> torch.dtype:
    """What the model's layers compute in, whatever its weights are stored as."""
    return base.manual_cast_dtype if base.manual_cast_dtype is not None else base.get_dtype()


def model_number(base: Any) -> int:
    """A number that names a loaded model for as long as it lives; its cached features go with it."""
    if base not in _model_numbers:
        number = next(_numbers)
        _model_numbers[base] = number
        weakref.finalize(base, CACHE.drop, lambda key: key.model == number)
    return _model_numbers[base]


def held_bytes(number: int) -> int:
    """What a model's features take of its device."""
    return CACHE.num_bytes(lambda key: key.model == number and key.on_device)


def free_features(number: int) -> None:
    """Forgets what a model that leaves its device has there. Features in RAM stay as long as its weights do."""
    CACHE.drop(lambda key: key.model == number and key.on_device)


def _placed(plan: FusionPlan, features: ReferenceFeatures, device: torch.device, dtype: torch.dtype) -> Any:
    key = (id(features), device, dtype)
    if key not in plan.kept:
        plan.kept[key] = features.to(device, dtype)
    return plan.kept[key]


def _text(
    plan: FusionPlan, faces: ReferencePass, context: Tensor | None, y: Tensor | None, options: Options
) -> ReferenceText:
    kinds = list(options.get("cond_or_uncond") or ())
    if not faces.positive_text or context is None or 0 not in kinds:
        return faces.text
    chunk = kinds.index(0)
    row = chunk * (context.shape[0] // len(kinds))
    tokens = context[row : row + 1]
    pooled = faces.text.pooled if y is None else y[row : row + 1, :POOLED_WIDTH]
    # The host names a prompt anew in every run, so its content is read once per run, not once per step.
    name = options["uuids"][chunk] if options.get("uuids") else None
    known = plan.prompts.get(name) or tensor_fingerprint(tokens)
    if name is not None:
        plan.prompts[name] = known
    return ReferenceText(tokens, pooled, "the positive prompt", known)


def _weights_state(base: Any) -> tuple[Any, ...]:
    """What decides the model's weights: its patches and the weight hooks in force."""
    patcher = base.current_patcher
    hooks = getattr(patcher, "current_hooks", None)
    state = tuple((id(h.hook_ref), h.strength) for h in hooks.hooks) if hooks else ()
    return str(patcher.patches_uuid), state
