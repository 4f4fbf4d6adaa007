"""What one attention layer computes while the faces act (METHOD 1.1): which rows, which regions, which keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..attention.cache import LayerFeatures
from ..attention.fusion import FaceKeys, decoupled_attention, fused_attention, length_term
from ..attention.grid import LATENT_SCALE
from ..attention.routing import Region, route
from ..attention.shares import attention_shares, output_shares
from ..attention.sites import Site
from ..attention.training_free import Statistics, shared_attention
from .attention_recording import LayerShares
from .fusion_plan import FaceSet, FusionPlan
from .host.layer_call import Change, LayerCall
from .host.messages import show_on_running_node
from .host.place import Place
from .host.prompts import Role

MOST_KEPT = 64
SLIGHT_STRETCH = 1.1


@dataclass(frozen=True, eq=False)
class Shows:
    """What one prompt's rows see. no_face: the tokens with which a community family was trained where no face is."""

    faces: FaceSet
    no_face: bool = False


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a layer that see faces. text: the keys of their text. regions: None where every query sees all faces."""

    rows: slice
    role: Role
    place: Place
    text: slice
    regions: tuple[Region, ...] | None
    faces: Sequence[FaceKeys]
    styles: Sequence[Statistics]


def change_layer(plan: FusionPlan, shows: Sequence[Shows | None], site: Site, call: LayerCall) -> Change:
    """The rows that see faces, and their output. shows: per prompt of the call, None where it sees none."""
    seen = {prompt: one for prompt, one in zip(call.model.prompts, shows) if one is not None}
    layers: dict[FaceSet, Sequence[LayerFeatures]] = {}
    parts = []
    for chunk in call.chunks:
        one = seen.get(chunk.prompt)
        if one is None:
            continue
        if one.faces not in layers:  # once per layer: the next layer's features set out when these arrive
            layers[one.faces] = one.faces.at(site.path)
        place = call.place(chunk)
        regions = _regions(plan, call, place)
        if plan.attention == "attn2" and (met := dict(_by_start(call, regions)).get(chunk.rows.start)) is not None:
            regions = met
        faces = _no_face_keys(plan, layers[one.faces]) if one.no_face else _face_keys(plan, layers[one.faces])
        styles = [style for layer in layers[one.faces] if (style := layer.statistics)]
        texts = call.texts_of(chunk) if plan.attention == "attn2" else [(chunk.rows, slice(None))]
        parts += [Part(rows, chunk.prompt.role, place, text, regions, faces, styles) for rows, text in texts]
    if call.model.recordings:
        _record(plan, parts, call)
    return [(part.rows, _attend(plan, call, part, call.v[part.rows], part.faces)) for part in parts]


def _by_start(call: LayerCall, faces: tuple[Region, ...] | None) -> list[tuple[int, tuple[Region, ...]]]:
    return [(rows.start, regions) for rows, regions in call.routed_text(faces)]


def _attend(plan: FusionPlan, call: LayerCall, part: Part, values: Tensor, faces: Sequence[FaceKeys]) -> Tensor:
    """The output of a part's rows, with values `[rows, K, C]` of the keys beside the faces'."""
    q, k, v = call.q[part.rows], call.k[part.rows][:, part.text], values[:, part.text]
    given: dict[str, Any] = {
        "heads": call.heads, "attend": call.attend, "regions": part.regions, "controls": plan.controls,
    }  # fmt: skip
    if plan.adain:
        call.require_grid("the picture's own statistics", "turn 'adain' off")
        return shared_attention(q, k, v, faces, part.styles, **given)
    if plan.combine == "decoupled":
        return decoupled_attention(q, k, v, faces, orthogonal=plan.orthogonal, **given)
    return fused_attention(q, k, v, faces, **given)


def _record(plan: FusionPlan, parts: Sequence[Part], call: LayerCall) -> None:
    """Tells the recordings who was looked at by the positive prompts' rows."""
    added = plan.combine == "decoupled" and not plan.adain
    as_is = plan if added else replace(plan, controls=replace(plan.controls, value_strength=1.0))
    batch = len(call.model.x) // len(call.model.prompts)
    for part in parts:
        if part.role is not Role.POSITIVE:
            continue

        def attention(values: Tensor, faces: Sequence[FaceKeys], part: Part = part) -> Tensor:
            return _attend(as_is, call, part, values, faces)

        values, people = call.v[part.rows], len(plan.names)
        if added:
            shares = output_shares(attention, values, part.faces, people=people)
        else:
            shares = attention_shares(attention, values, part.faces, people=people, heads=call.heads)
        pictures = min(batch, len(shares))  # a part of one row, where the pictures show different things
        seen = LayerShares(plan.number, plan.names, shares, call.grid, part.place.latent_hw, part.place.area, pictures)
        for recording in call.model.recordings:
            recording.add(seen)


def _face_keys(plan: FusionPlan, layers: Sequence[LayerFeatures]) -> list[FaceKeys]:
    identities = [one.identity for one in plan.shown]
    keys = []
    for one, layer in zip(plan.shown, layers):
        count = identities.count(one.identity)
        term = length_term(
            plan.length, num_tokens=layer.num_tokens, num_references=count, num_trained=layer.num_trained
        )
        keys.append(FaceKeys(layer.key, layer.value, one.identity, math.log(one.weight) + term, layer.log_size))
    return keys


def _no_face_keys(plan: FusionPlan, layers: Sequence[LayerFeatures]) -> list[FaceKeys]:
    """The tokens of "no face", for whoever would be seen there: a region without a person gets none."""
    people = range(len(plan.names)) if plan.routed is not None else (0,)
    return [FaceKeys(layer.key, layer.value, person) for person in people for layer in layers]


def _regions(plan: FusionPlan, call: LayerCall, place: Place) -> tuple[Region, ...] | None:
    routed = plan.routed
    if routed is None:
        return None
    call.require_grid("the masks of 'routed'", "use one identity without masks")
    key = (call.grid, place.shown, call.q.device)
    if key not in plan.regions:
        if len(plan.regions) >= MOST_KEPT:
            plan.regions.clear()
        if not plan.regions:  # once per run of the node
            _check_shape(place.masks(routed.masks), place)
        found = route(
            place.masks(routed.masks), call.grid, background=routed.background, soft=routed.soft,  # type: ignore[arg-type]
            elsewhere_I=place.elsewhere(routed.masks),
        )  # fmt: skip
        plan.regions[key] = tuple(region.to(call.q.device) for region in found)
    return plan.regions[key]


def _check_shape(masks_IHW: Tensor, place: Place) -> None:
    """Masks are stretched to the picture; says so where that moves people."""
    height, width = masks_IHW.shape[-2:]
    rows, columns = place.latent_hw if place.area is None else place.area[:2]
    stretch = (width / height) / (columns / rows)
    if max(stretch, 1 / stretch) > SLIGHT_STRETCH:
        show_on_running_node(
            f"the masks are {width} x {height}, what is sampled has other proportions ({columns * LATENT_SCALE} x "
            f"{rows * LATENT_SCALE} pixels): they are stretched to it. Paint masks at the picture's size; where a node "
            "samples parts of the picture, connect its prompts through FusedIDPlaceInPicture"
        )
