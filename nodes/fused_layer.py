"""What one attention layer computes while the faces act (METHOD 1.1): which rows, which regions, which keys."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.cache import LayerFeatures
from ..attention.fusion import FaceKeys, decoupled_attention, fused_attention, length_term
from ..attention.grid import crop_masks
from ..attention.routing import Region, route
from ..attention.shares import attention_shares, output_shares
from ..attention.sites import Site
from ..attention.training_free import Statistics, shared_attention
from .areas import Area, chunk_areas
from .attention_recording import LayerShares, listening
from .fusion_plan import FusionPlan, Run
from .guidance_slot import SPANS_KEY, host_attention, routed_rows, text_attention
from .rows import positive_rows
from .slot import Options, Replacement

log = logging.getLogger("fusedid")

MOST_KEPT = 64
SLIGHT_STRETCH = 1.1
RUNS = "fusedid_runs"
"""Where a UNet call's transformer_options hold the `Run` of every plan that acts in it, by the plan's number."""

Part = tuple[slice, "tuple[Region, ...] | None", Sequence[FaceKeys]]
"""Rows of the batch, the regions of their queries (None: every query sees every face), keys per reference."""


def layer_replacement(plan: FusionPlan, site: Site) -> Replacement:
    """The function that takes the layer's place: None when the faces do not act in this call."""

    def layer(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor | None:
        run = options.get(RUNS, {}).get(plan.number)
        if run is None:
            return None
        layers = run.at(site.path)
        styles = [style for one in layers if (style := one.statistics)]
        parts = _parts(plan, site, run, _face_keys(plan, layers), q, options)
        done = [
            (rows, _attend(plan, q[rows], k[rows], v[rows], options, regions, faces, styles))
            for rows, regions, faces in parts
        ]
        if listening(options):
            _record(plan, parts, q, k, v, options, styles)
        if options.get(SPANS_KEY) is None or plan.attention == "attn1":
            return _joined(done, q, k, v, options)
        out = text_attention(q, k, v, options).clone()
        for rows, values in done:
            out[rows] = values
        return out

    return layer


def _joined(done: Sequence[tuple[slice, Tensor]], q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Our rows, and between them the host's own attention: nothing is computed twice."""
    spans = [(rows.start, rows.stop) for rows, _ in done]
    plain = [(rows, host_attention(q[rows], k[rows], v[rows], options)) for rows in _gaps(spans, q.shape[0])]
    pieces = [values for _, values in sorted([*done, *plain], key=lambda piece: piece[0].start)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _attend(
    plan: FusionPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    regions: tuple[Region, ...] | None,
    faces: Sequence[FaceKeys],
    styles: Sequence[Statistics],
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return host_attention(q, k, v, {**options, "n_heads": heads})

    given: dict[str, Any] = {"attend": attend, "regions": regions, "controls": plan.controls}
    heads = options["n_heads"]
    if plan.adain:
        return shared_attention(q, k, v, faces, styles, heads=heads, **given)
    attention = decoupled_attention if plan.combine == "decoupled" else fused_attention
    return attention(q, k, v, faces, heads=heads, **given)


def _record(
    plan: FusionPlan,
    parts: Sequence[Part],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    styles: Sequence[Statistics],
) -> None:
    """Tells the recordings who was looked at; the positive prompts' rows come first among the parts."""
    num_latents, _, *grid = options["activations_shape"]
    kinds = options.get("cond_or_uncond") or [0]
    full_hw, areas = _positive_areas(options, kinds)
    added = plan.combine == "decoupled" and not plan.adain
    as_is = plan if added else replace(plan, controls=replace(plan.controls, value_strength=1.0))
    for (rows, regions, faces), area in zip(parts, areas):
        attention = partial(_attend_values, as_is, q[rows], k[rows], options, regions, styles)
        if added:
            shares = output_shares(attention, v[rows], faces, people=len(plan.names))
        else:
            shares = attention_shares(attention, v[rows], faces, people=len(plan.names), heads=options["n_heads"])
        found = LayerShares(
            plan.number, plan.names, shares, (grid[0], grid[1]), full_hw, area, num_latents // len(kinds)
        )
        for recording in listening(options):
            recording.add(found)


def _attend_values(
    plan: FusionPlan,
    q: Tensor,
    k: Tensor,
    options: Options,
    regions: tuple[Region, ...] | None,
    styles: Sequence[Statistics],
    value: Tensor,
    faces: Sequence[FaceKeys],
) -> Tensor:
    return _attend(plan, q, k, value, options, regions, faces, styles)


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


def _parts(
    plan: FusionPlan, site: Site, run: Run, faces: Sequence[FaceKeys], q: Tensor, options: Options
) -> list[Part]:
    kinds = options.get("cond_or_uncond") or [0]
    num_latents, _, *grid = options["activations_shape"]
    spans = positive_rows(q.shape[0], kinds, num_latents)
    full_hw, positive = _positive_areas(options, kinds)
    parts: list[Part] = []
    for (start, stop), area in zip(spans, positive):
        regions = _regions(plan, (grid[0], grid[1]), full_hw, area, q)
        if plan.attention == "attn2" and options.get(SPANS_KEY) is not None:
            met = {(rows.start, rows.stop): found for rows, found in routed_rows(q, options, faces=regions)}
            regions = met.get((start, stop), regions)
        parts.append((slice(start, stop), regions, faces))
    gaps = _gaps(spans, q.shape[0])
    if plan.both:
        return parts + [(rows, _regions(plan, (grid[0], grid[1]), full_hw, None, q), faces) for rows in gaps]
    if run.negative is not None:
        layer = run.negative.layers[site.path]
        return parts + [(rows, None, [FaceKeys(layer.key, layer.value)]) for rows in gaps]
    return parts


def _positive_areas(options: Options, kinds: Sequence[int]) -> tuple[tuple[int, int], list[Area | None]]:
    """Size of the whole latent, and the area that each positive prompt shows."""
    full_hw, areas = chunk_areas(options)
    return full_hw, [area for area, kind in zip(itertools.cycle(areas), kinds) if kind == 0]


def _gaps(spans: Sequence[tuple[int, int]], num_rows: int) -> list[slice]:
    edges = [0, *itertools.chain.from_iterable(sorted(spans)), num_rows]
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]


def _regions(
    plan: FusionPlan, grid: tuple[int, int], full_hw: tuple[int, int], area: Area | None, q: Tensor
) -> tuple[Region, ...] | None:
    routed = plan.routed
    if routed is None:
        return None
    if q.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"FusedIDAttentionPatch: another node merges or splits tokens (a layer of {grid[0]}x{grid[1]} has "
            f"{q.shape[1]}), so the masks of 'routed' cannot be applied. Remove token merging or tiling of attention, "
            "or use one identity without masks"
        )
    key = (grid, full_hw if area else None, area, q.device)
    if key not in plan.regions:
        if len(plan.regions) >= MOST_KEPT:
            plan.regions.clear()
        if not plan.regions:  # once per run of the node
            _check_shape(routed.masks, full_hw)
        masks = routed.masks if area is None else crop_masks(routed.masks, full_hw, area)
        found = route(masks, grid, background=routed.background, soft=routed.soft)  # type: ignore[arg-type]
        plan.regions[key] = tuple(region.to(q.device) for region in found)
    return plan.regions[key]


def _check_shape(masks_IHW: Tensor, full_hw: tuple[int, int]) -> None:
    """Masks are stretched to the picture; says so where that moves people."""
    height, width = masks_IHW.shape[-2:]
    stretch = (width / height) / (full_hw[1] / full_hw[0])
    if max(stretch, 1 / stretch) > SLIGHT_STRETCH:
        log.warning(
            "FusedIDAttentionPatch: the masks are %dx%d, the picture has other proportions (latent %dx%d): they are "
            "stretched to it. Paint masks at the picture's size to keep people in place",
            width, height, full_hw[1], full_hw[0],
        )  # fmt: skip
