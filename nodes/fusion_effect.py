"""Puts a `FusionPlan` into a MODEL: whether its faces act in a call, and with which features."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
from torch import nn

from ..attention.cache import ReferenceFeatures
from ..attention.prefetch import Prefetch
from ..attention.storage import AS_COMPUTED
from .face_sources import tensor_fingerprint
from .feature_store import feature_store
from .fused_layer import Shows, change_layer
from .fusion_plan import FaceSet, FusionPlan, GivenFaces, ReferencePass, device_bytes
from .host.effect import Acting
from .host.install import installed
from .host.model_call import ModelCall
from .host.prompts import Prompt, Role
from .reference import ReferenceText
from .reference_cache import Held, call_features, compute_dtype

NODE = "FusedIDAttentionPatch"


class FusionEffect:
    """The faces of one node in a MODEL."""

    label = NODE
    kind = ""  # two patches on one MODEL add up

    def __init__(self, plan: FusionPlan) -> None:
        self.plan, self.attention = plan, plan.attention
        self.sites = {site.key: site for site in plan.sites if site.path in plan.active}

    def begin(self, call: ModelCall) -> Acting | None:
        """See `host.effect.Effect`."""
        plan, faces = self.plan, self.plan.faces
        no_face = faces.negative if isinstance(faces, GivenFaces) else None
        asked = [Role.POSITIVE] + [Role.NEGATIVE] * plan.both + [Role.NEGATIVE, Role.UNKNOWN] * (no_face is not None)
        if not call.has(*asked) or call.sampling is None or not call.within(plan.start, plan.end):
            return None
        features: Held = call.sampling.keep(("features", plan.number), dict)
        texts: dict[Any, ReferenceText] = call.sampling.keep(("texts", plan.number), dict)
        given: dict[Any, ReferenceFeatures] = call.sampling.keep(("given", plan.number), dict)
        sets: dict[Any, FaceSet] = {}

        def seen_by(prompt: Prompt) -> FaceSet:
            if isinstance(faces, GivenFaces):
                return FaceSet(tuple(_placed(given, one, call) for one in faces.features))
            text = _text(faces, prompt, call, texts)
            if text.fingerprint not in sets:
                sets[text.fingerprint] = self._set(faces, call, text, features)
            return sets[text.fingerprint]

        shows = []
        for prompt in call.prompts:
            if prompt.role is Role.POSITIVE or (prompt.role is Role.NEGATIVE and plan.both):
                shows.append(Shows(seen_by(prompt)))
            elif no_face is not None:
                shows.append(Shows(FaceSet((_placed(given, no_face, call),)), no_face=True))
            else:
                shows.append(None)
        return Acting(NODE, plan.attention, self.sites, partial(change_layer, plan, shows))

    def _set(self, faces: ReferencePass, call: ModelCall, text: ReferenceText, held: Held) -> FaceSet:
        found: Any = call_features(self.plan, faces, call, text, held)
        if faces.storage == AS_COMPUTED:
            return FaceSet(found)
        order = [site.path for site in self.plan.sites if site.path in self.plan.active]
        return FaceSet((), ahead=Prefetch(found, order, call.x.device))


def install_fusion(model: Any, plan: FusionPlan) -> Any:
    """A clone of the MODEL with the plan's faces. The host counts and frees what they take of its memory."""
    clone = installed(model, FusionEffect(plan))
    if not isinstance(plan.faces, ReferencePass):
        return clone
    store = feature_store(clone.model)
    store.expect(device_bytes(plan, compute_dtype(clone.model).itemsize, management.get_torch_device().type))
    models = [store]
    if plan.faces.matched and isinstance(plan.faces.source, nn.Module):  # needed at every step, not once
        devices = management.get_torch_device(), management.unet_offload_device()
        models.append(comfy.model_patcher.ModelPatcher(plan.faces.source, *devices))
    clone.set_additional_models(f"fusedid_{plan.number}", models)
    return clone


def _placed(held: dict[Any, ReferenceFeatures], features: ReferenceFeatures, call: ModelCall) -> ReferenceFeatures:
    """Given features as the model computes, made once per run."""
    key = (features, call.x.device, compute_dtype(call.base))
    if key not in held:
        held[key] = features.to(*key[1:])
    return held[key]


def _text(faces: ReferencePass, prompt: Prompt, call: ModelCall, held: dict[Any, ReferenceText]) -> ReferenceText:
    """What the reference pass reads for one prompt's rows: its own text if that is positive, else the positive one's.

    A prompt is named anew in every run, so its content is read once per run, not once per step.
    """
    if not faces.positive_text:
        return faces.text
    positive = prompt if prompt.role is Role.POSITIVE else call.positive()
    text = None if positive is None else call.text(positive)
    if positive is None or text is None:
        return faces.text
    if positive.uuid not in held:
        pooled = faces.text.pooled if text.pooled is None else text.pooled
        known = tensor_fingerprint(text.context) + ("" if pooled is None else tensor_fingerprint(pooled))
        held[positive.uuid] = ReferenceText(text.context, pooled, "the positive prompt", known)
    return held[positive.uuid]
