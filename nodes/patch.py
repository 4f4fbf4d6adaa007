"""Puts a `FusionPlan` into a MODEL: with `feature_store.py` the only file that knows the host's ModelPatcher.

At every UNet call a wrapper decides once whether the faces act, makes sure their features exist, and hands them to the
layers through the call's own transformer_options. So two patches, two threads or a ControlNet never see each other's
state, and no layer asks the device for anything.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.patcher_extension as extension
from torch import Tensor, nn

from .areas import note_areas
from .feature_store import feature_store
from .fused_layer import RUNS, layer_replacement
from .fusion_plan import FusionPlan, GivenFaces, ReferencePass, device_bytes
from .reference_cache import call_features, compute_dtype
from .slot import Slot, install

NODE = "FusedIDAttentionPatch"


def install_fusion(model: Any, plan: FusionPlan) -> tuple[Any, int]:
    """A patched clone of the MODEL and the number of its layers that now hold our slot."""
    clone = model.clone()
    sites = [site for site in plan.sites if site.path in plan.active]
    layers = install(clone, plan.attention, sites, lambda site: layer_replacement(plan, site))
    key = f"fusedid_{plan.number}"
    clone.add_wrapper_with_key(extension.WrappersMP.CALC_COND_BATCH, key, note_areas)
    clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, key, _prepare_call(plan))
    for event in (extension.CallbacksMP.ON_PRE_RUN, extension.CallbacksMP.ON_CLEANUP):  # a run that failed had no end
        clone.add_callback_with_key(event, key, lambda *_: plan.forget_run())
    clone.add_callback_with_key(extension.CallbacksMP.ON_CLONE, key, _own_slots)
    _register_memory(clone, key, plan)
    return clone, layers


def _register_memory(clone: Any, key: str, plan: FusionPlan) -> None:
    """Lets the host count and free the features; and the adapter, when it is needed at every step, not once."""
    if not isinstance(plan.faces, ReferencePass):
        return
    store = feature_store(clone.model)
    store.expect(device_bytes(plan, compute_dtype(clone.model).itemsize, management.get_torch_device().type))
    models = [store]
    if plan.faces.matched and isinstance(plan.faces.source, nn.Module):
        devices = management.get_torch_device(), management.unet_offload_device()
        models.append(comfy.model_patcher.ModelPatcher(plan.faces.source, *devices))
    clone.set_additional_models(key, models)


def _own_slots(_: Any, clone: Any) -> None:
    """A clone gets slots of its own, also from hosts that do not copy what options hold: packs `.add` to them."""
    replaced = clone.model_options.get("transformer_options", {}).get("patches_replace", {})
    for slots in replaced.values():
        memo: dict[int, Any] = {}
        slots.update({key: copy.deepcopy(slot, memo) for key, slot in slots.items() if isinstance(slot, Slot)})


def _shows(plan: FusionPlan, kinds: Any) -> bool:
    """Whether any row of a call sees something of ours: hosts may run the negative prompt in a call of its own."""
    negative = isinstance(plan.faces, GivenFaces) and plan.faces.negative is not None
    return not kinds or 0 in kinds or plan.both or negative


def _prepare_call(plan: FusionPlan) -> Any:
    def apply_model(
        executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = None, **named: Any,
    ) -> Any:  # fmt: skip
        options = transformer_options or {}
        if not _shows(plan, options.get("cond_or_uncond")):
            return executor(x, t, c_concat, c_crossattn, control, options, **named)
        # Reading the noise level is the one wait for the device in a call, and none when the window is open throughout.
        if plan.window.always or plan.window.contains(float(t.flatten()[0])):
            try:
                run = call_features(plan, executor.class_obj, x, t, c_crossattn, named.get("y"), options)
            except ValueError as error:
                raise ValueError(f"{NODE}: {error}") from error
            options = {**options, RUNS: {**options.get(RUNS, {}), plan.number: run}}
        return executor(x, t, c_concat, c_crossattn, control, options, **named)

    return apply_model
