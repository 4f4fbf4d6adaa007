"""Puts effects into a MODEL, and carries them out at every call of it.

Four wrappers of the host are all of us that a MODEL holds, however many effects there are: at the start of a run they
note the guider, at every step what its prompts are, at every call of the model what acts. A last one, put innermost at
every call, exchanges the layers' functions when nobody else can any more.
"""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension as extension
from torch import Tensor

from .effect import Acting, Acts, Effect, Effects, Routing
from .lost_layers import watched
from .messages import named_in_errors
from .model_call import ModelCall
from .sampling import note_run, noted_step
from .slot import with_slots
from .told_place import note_view

EFFECTS = "fusedid_effects"
"""Where a MODEL's transformer_options hold its `Effects`; also the name of our wrappers."""
OPTIONS = "transformer_options"


def installed(model: Any, effect: Effect) -> Any:
    """A clone of the MODEL with one more effect."""
    clone = model.clone()
    options = clone.model_options["transformer_options"] = clone.model_options["transformer_options"].copy()
    present: Effects | None = options.get(EFFECTS)
    options[EFFECTS] = (present or Effects()).with_effect(effect)
    if present is None:
        wrappers = extension.WrappersMP
        clone.add_wrapper_with_key(wrappers.OUTER_SAMPLE, EFFECTS, note_run)
        clone.add_wrapper_with_key(wrappers.OUTER_SAMPLE, EFFECTS, note_view)
        clone.add_wrapper_with_key(wrappers.CALC_COND_BATCH, EFFECTS, _note_step)
        clone.add_wrapper_with_key(wrappers.APPLY_MODEL, EFFECTS, _apply_model)
    return clone


def effects_of(model: Any) -> tuple[Effect, ...]:
    """What of ours is on a MODEL."""
    present: Effects | None = model.model_options["transformer_options"].get(EFFECTS)
    return () if present is None else present.members


def _note_step(executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any, *rest: Any) -> Any:
    noted = noted_step(options.get("transformer_options", {}), conds, x)
    noted = _innermost(noted, extension.WrappersMP.APPLY_MODEL, [_apply_model])
    return executor(model, conds, x, timestep, {**options, "transformer_options": noted}, *rest)


def _innermost(options: dict[str, Any], kind: str, ours: list[Any]) -> dict[str, Any]:
    """Options in which our wrapper is the last of its kind: the next to the model."""
    wrappers = options.get("wrappers", {})
    others = {key: listed for key, listed in wrappers.get(kind, {}).items() if key != EFFECTS}
    return {**options, "wrappers": {**wrappers, kind: {**others, EFFECTS: ours}}}


def _apply_model(
    executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
    transformer_options: Any = None, **named: Any,
) -> Any:  # fmt: skip
    options = transformer_options or {}
    effects: Effects | None = options.get(EFFECTS)
    acts = None if effects is None else _begun(effects, executor.class_obj, x, t, c_crossattn, named.get("y"), options)
    if effects is None or acts is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **named)
    kind = extension.WrappersMP.DIFFUSION_MODEL
    if options.get("wrappers", {}).get(kind):

        def diffusion_model(inner: Any, *given: Any, **named: Any) -> Any:
            """The UNet's forward: (x, timesteps, context, y, control, transformer_options)."""
            if OPTIONS in named:
                return inner(*given, **{**named, OPTIONS: with_slots(named[OPTIONS], effects, acts)})
            before, (options, *rest) = given[:5], given[5:]
            return inner(*before, with_slots(options, effects, acts), *rest, **named)

        options = _innermost(options, kind, [diffusion_model])
    else:
        options = with_slots(options, effects, acts)
    with watched(acts):
        return executor(x, t, c_concat, c_crossattn, control, options, **named)


def _begun(
    effects: Effects, base: Any, x: Tensor, t: Tensor, context: Any, label: Any, options: dict[str, Any]
) -> Acts | None:
    call = ModelCall(base, x, t, context, label, options)
    found = []
    for effect in effects.members:
        with named_in_errors(effect.label):
            found.append(effect.begin(call))
    acting = [one for one in found if isinstance(one, Acting)]
    routing = next((one for one in found if isinstance(one, Routing)), None)
    return Acts(call, acting, routing) if acting or routing is not None else None
