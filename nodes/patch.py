"""Puts fused attention into a MODEL: the only file that knows the host's ModelPatcher.

One `FusionPatch` is shared by all clones of a patched MODEL. At every UNet call a wrapper decides once whether the
identity acts, makes sure the reference features exist, and hands them to the layers through the call's own
transformer_options; so two patches, two threads or a ControlNet never see each other's state.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.patcher_extension as extension
import torch
from torch import Tensor

from ..attention.adapter import FusionAdapter
from ..attention.cache import ReferenceCache, ReferenceFeatures
from ..attention.fusion import FaceControls, FaceKeys, decoupled_attention, fused_attention, length_term
from ..attention.grid import crop_masks
from ..attention.routing import Region, route
from ..attention.schedule import Window
from ..attention.sites import Site
from .guidance_slot import host_attention, routed_rows, text_attention
from .reference import ReferenceLatent, ReferenceText, reference_features
from .rows import positive_rows
from .slot import Options, Replacement, install
from .wire_types import RoutedIdentities

RUNS = "fusedid_runs"
AREAS = "fusedid_areas"
CACHE = ReferenceCache(budget_mib=2048)
_numbers = itertools.count()
_model_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class FusionPatch:
    """Everything a patched MODEL computes with, fixed when the node runs.

    negative: features for the negative prompt's rows, of families trained with "no face" there. given: features per
    reference for sources that need no reference pass (community adapters), else None.
    """

    sites: tuple[Site, ...]
    references: tuple[ReferenceLatent, ...]
    text: ReferenceText | None
    adapter: FusionAdapter | None
    controls: FaceControls
    window: Window
    combine: str
    length: str
    timestep: str
    text_mode: str
    both: bool
    routed: RoutedIdentities | None = None
    given: tuple[ReferenceFeatures, ...] | None = None
    negative: ReferenceFeatures | None = None
    active: frozenset[str] = frozenset()
    number: int = field(default_factory=lambda: next(_numbers))
    regions: dict[Any, tuple[Region, ...]] = field(default_factory=dict)
    held: dict[Any, ReferenceFeatures] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """One UNet call in which the identity acts: features per reference, latent size, area per chunk."""

    features: tuple[ReferenceFeatures, ...]
    latent_hw: tuple[int, int]
    areas: dict[Any, tuple[int, int, int, int]]


def install_fusion(model: Any, patch: FusionPatch, additional: Sequence[Any] = ()) -> tuple[Any, int]:
    """A patched clone of the MODEL and the number of its layers that now hold our slot."""
    clone = model.clone()
    wanted = [site for site in patch.sites if site.path in patch.active]
    layers = install(clone, wanted, lambda site: _replacement(patch, site))
    key = f"fusedid_{patch.number}"
    clone.add_wrapper_with_key(extension.WrappersMP.CALC_COND_BATCH, key, _note_areas)
    clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, key, _prepare_call(patch))
    clone.add_callback_with_key(extension.CallbacksMP.ON_CLEANUP, key, lambda *_: patch.held.clear())
    clone.add_callback_with_key(extension.CallbacksMP.ON_DETACH, key, _free_features)
    if additional:
        clone.set_additional_models(key, list(additional))
    return clone, layers


def model_number(base: Any) -> int:
    """A number that names a loaded model for as long as it lives; its cached features go with it."""
    if base not in _model_numbers:
        number = next(_numbers)
        _model_numbers[base] = number
        weakref.finalize(base, CACHE.drop, lambda key, number=number: key[0] == number)
    return _model_numbers[base]


def _free_features(patcher: Any, unpatch_all: bool = True, *_: Any) -> None:
    if unpatch_all:
        number = model_number(patcher.model)
        CACHE.drop(lambda key: key[0] == number)


def _note_areas(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Any, options: Any, *rest: Any) -> Any:
    """Tells the layers which part of the latent every prompt's chunk shows (area conditioning)."""
    areas = {
        cond["uuid"]: tuple(int(n) for n in cond["area"])
        for group in conds
        for cond in group or ()
        if "uuid" in cond and len(cond.get("area") or ()) == 4
    }
    noted = {**options.get("transformer_options", {}), AREAS: (tuple(x.shape[-2:]), areas)}
    return executor(model, conds, x, timestep, {**options, "transformer_options": noted}, *rest)


def _prepare_call(patch: FusionPatch) -> Any:
    def apply_model(
        executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = None, **named: Any,
    ) -> Any:  # fmt: skip
        options = transformer_options or {}
        if patch.window.contains(float(t.flatten()[0])):  # the one device sync of the call
            features = _features(executor.class_obj, patch, x, t, c_crossattn, options)
            full_hw, areas = options.get(AREAS, (tuple(x.shape[-2:]), {}))
            run = Run(features, full_hw if areas else tuple(x.shape[-2:]), areas)
            options = {**options, RUNS: {**options.get(RUNS, {}), patch.number: run}}
        return executor(x, t, c_concat, c_crossattn, control, options, **named)

    return apply_model


def _features(
    base: Any, patch: FusionPatch, x: Tensor, t: Tensor, context: Tensor | None, options: Options
) -> tuple[ReferenceFeatures, ...]:
    if patch.given is not None:
        return patch.given
    adapter, text = patch.adapter, _text(patch, context, options)
    assert adapter is not None
    sigma = t.flatten()[:1] if patch.timestep == "matched" else None
    noise = None if sigma is None else float(sigma)
    model = (model_number(base), *_weights_state(base), str(base.manual_cast_dtype or base.get_dtype()), str(x.device))
    kept = {k: options[k] for k in ("optimized_attention_override",) if k in options}

    def feature(reference: ReferenceLatent) -> ReferenceFeatures:
        key = (*model, adapter.fingerprint, reference.fingerprint, text.fingerprint, noise)

        def compute() -> ReferenceFeatures:
            given = {"device": x.device, "kept": kept}
            return reference_features(base, reference, text, adapter, patch.sites, sigma=sigma, options=given)

        if key not in patch.held:
            if noise is not None:  # another step's features are never asked for again
                for old in [k for k in patch.held if k[-1] != noise]:
                    del patch.held[old]
            patch.held[key] = compute() if noise is not None else CACHE.get(key, compute)
        return patch.held[key]

    return tuple(feature(reference) for reference in patch.references)


def _text(patch: FusionPatch, context: Tensor | None, options: Options) -> ReferenceText:
    assert patch.text is not None
    kinds = options.get("cond_or_uncond", ())
    if patch.text_mode != "positive" or context is None or 0 not in kinds:
        return patch.text
    chunk = list(kinds).index(0)
    row = context[chunk * (context.shape[0] // len(kinds))][None]
    name = options.get("uuids", [id(row)] * len(kinds))[chunk]
    return ReferenceText(row, patch.text.pooled, "positive prompt", str(name))


def _weights_state(base: Any) -> tuple[Any, ...]:
    """What decides the model's weights: its patches and the weight hooks in force."""
    patcher = base.current_patcher
    hooks = getattr(patcher, "current_hooks", None)
    state = tuple((id(h.hook_ref), h.strength) for h in hooks.hooks) if hooks else ()
    return str(patcher.patches_uuid), state


def _replacement(patch: FusionPatch, site: Site) -> Replacement:
    attention = fused_attention if patch.combine == "fused" else decoupled_attention

    def replace(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor | None:
        run = options.get(RUNS, {}).get(patch.number)
        if run is None:
            return None
        out = text_attention(q, k, v, options).clone()
        faces = _face_keys(patch, site, run.features)

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            return host_attention(q, k, v, {**options, "n_heads": heads})

        for rows, regions, shown in _rows_to_change(patch, q, options, run, faces, site):
            out[rows] = attention(
                q[rows], k[rows], v[rows], shown, heads=options["n_heads"], attend=attend, regions=regions,
                controls=patch.controls,
            )  # fmt: skip
        return out

    return replace


def _rows_to_change(
    patch: FusionPatch, q: Tensor, options: Options, run: Run, faces: tuple[FaceKeys, ...], site: Site
) -> list[tuple[slice, tuple[Region, ...] | None, tuple[FaceKeys, ...]]]:
    kinds = options.get("cond_or_uncond") or [0]
    num_latents, _, *grid = options["activations_shape"]
    spans = positive_rows(q.shape[0], kinds, num_latents)
    uuids = options.get("uuids") or [None] * len(kinds)
    positive = [uuid for uuid, kind in zip(uuids, kinds) if kind == 0]
    todo = []
    for (start, stop), uuid in zip(spans, positive):
        regions = _regions(patch, tuple(grid), run, run.areas.get(uuid), q)
        met = {_span(rows): found for rows, found in routed_rows(q, options, faces=regions)}
        todo.append((slice(start, stop), met.get((start, stop), regions), faces))
    if patch.both or patch.negative is not None:
        shown = faces if patch.both else _negative_keys(patch, site)
        todo += [(rows, None, shown) for rows in _gaps(spans, q.shape[0])]
    return todo


def _span(rows: slice) -> tuple[int, int]:
    return rows.start, rows.stop


def _gaps(spans: Sequence[tuple[int, int]], num_rows: int) -> list[slice]:
    edges = [0, *itertools.chain.from_iterable(spans), num_rows]
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]


def _regions(
    patch: FusionPatch, grid: tuple[int, ...], run: Run, area: tuple[int, int, int, int] | None, q: Tensor
) -> tuple[Region, ...] | None:
    routed = patch.routed
    if routed is None:
        return None
    key = (grid, run.latent_hw if area else None, area, q.device)
    if key not in patch.regions:
        masks = routed.masks if area is None else crop_masks(routed.masks, run.latent_hw, area)
        found = route(masks, (grid[0], grid[1]), background=routed.background, soft=routed.soft)  # type: ignore[arg-type]
        patch.regions[key] = tuple(region.to(q.device) for region in found)
    return patch.regions[key]


def _face_keys(patch: FusionPatch, site: Site, features: Sequence[ReferenceFeatures]) -> tuple[FaceKeys, ...]:
    counts = [r.identity for r in patch.references]
    keys = []
    for reference, feature in zip(patch.references, features):
        layer = feature.layers[site.path]
        term = math.log(reference.weight) + length_term(
            patch.length, num_tokens=layer.key.shape[1], num_references=counts.count(reference.identity),
            num_trained=layer.num_trained,
        )  # fmt: skip
        keys.append(FaceKeys(layer.key, layer.value, reference.identity, term))
    return tuple(keys)


def _negative_keys(patch: FusionPatch, site: Site) -> tuple[FaceKeys, ...]:
    assert patch.negative is not None
    layer = patch.negative.layers[site.path]
    return (FaceKeys(layer.key, layer.value),)


class AdapterWeights(torch.nn.Module):
    """An adapter's projections as a module, so that the host counts, moves and frees them like any model."""

    def __init__(self, adapter: FusionAdapter) -> None:
        super().__init__()
        weights = [w for p in adapter.projections.values() for w in (p.key, p.value)]
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(w, requires_grad=False) for w in weights)
