"""Promise 3: the same adapter file gives the same UNet output in ComfyUI and in diffusers (fp32, 1e-4).

One small model per layout, with the same weights in both. In ComfyUI FusedIDAttentionPatch (and MultiIDMaskRouter) do
the work inside the host's sampling code; in diffusers the code that `python -m training.sample` draws with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers_twin import HostBase, UNetCall, VaeOnCpu, context_of, fused_twin, watched_call
from fusion_lab import SIGMA, FusionLab, halves, largest, noise
from torch import Tensor

from attention.adapter import load_adapter
from attention.fusion import FaceControls
from attention.sites import discover_sites
from training.processors import other_rows
from training.references import Person, make_references
from training.unet import FusedUNet

LAYOUTS = ["sd15_small", "sdxl_tiny"]
TOLERANCE = 1e-4
LATENT = (9, 12)


@pytest.fixture(scope="module")
def labs(pack: Any, small_models: Any) -> Any:
    made: dict[str, tuple[FusionLab, FusedUNet]] = {}

    def lab(layout: str) -> tuple[FusionLab, FusedUNet]:
        if layout not in made:
            host = FusionLab(pack, small_models, layout)
            made[layout] = host, fused_twin(host.model)
        host, fused = made[layout]
        fused.load_adapter(load_adapter(host.adapter), name=host.adapter.name)
        return host, fused

    return lab


def in_comfyui(lab: FusionLab, model: Any) -> UNetCall:
    """One denoising step with guidance at a latent of an odd size."""
    return watched_call(lab, model, latent=noise(1, LATENT) * SIGMA)


@torch.no_grad()
def in_diffusers(
    lab: FusionLab,
    fused: FusedUNet,
    call: UNetCall,
    people: list[Any],
    routed: Any = None,
    strength: float = 1.0,
) -> Tensor:
    """The same rows through diffusers' UNet; without people the plain one."""
    context = context_of(fused, call, (lab.positive, lab.negative))
    base: Any = HostBase(lab.model, VaeOnCpu(lab.vae), lab.positive)
    adapter = load_adapter(lab.adapter)
    assert adapter.prompt_context is not None
    shown = [Person(tuple(r.crop for r in p.references), tuple(r.weight for r in p.references)) for p in people]
    references = make_references(base, fused, shown, "", (adapter.prompt_context, adapter.prompt_pooled))
    regions = None
    if routed is not None:
        regions = fused.regions(routed.masks, LATENT, background=routed.background, soft=routed.soft)
    rows = (~call.negative).nonzero()[:, 0]
    assert len(rows) == 1 and len(other_rows(rows, len(call.x))) == 1, "one row sees the faces, the negative does not"
    controls = FaceControls(strength=strength)
    return fused(call.x, call.t, context, references, rows=rows, regions=regions, controls=controls)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_two_unets_are_the_same_without_faces(layout, labs):
    lab, fused = labs(layout)
    call = in_comfyui(lab, lab.model)
    assert largest(in_diffusers(lab, fused, call, []) - call.out) < TOLERANCE
    assert float(call.out.std()) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sites_have_the_same_names_levels_and_widths(layout, labs):
    lab, fused = labs(layout)
    assert discover_sites(lab.unet) == fused.sites


CASES: dict[str, tuple[list[list[float]], dict[str, Any], dict[str, Any]]] = {
    "single": ([[1.0]], {}, {}),
    "several references": ([[1.0, 0.5, 1.5]], {}, {}),
    "weights of another mean": ([[1.0, 0.5, 2.0]], {}, {}),
    "one weight that is not 1": ([[5.0]], {}, {}),
    "length as in the paper": ([[1.0, 1.0]], {"length": "paper"}, {}),
    "the positive prompt in the reference pass": ([[1.0]], {"reference_text": "positive"}, {}),
    "decoupled": ([[1.0]], {"combine": "decoupled"}, {}),
    "strength": ([[1.0]], {"strength": 2.5}, {}),
    "routed": ([[1.0], [1.0]], {}, {"background": "all"}),
    "routed, several references": ([[1.0], [0.7, 1.3]], {}, {"background": "all"}),
    "routed, weights of another mean": ([[0.2], [7.0, 1.0]], {}, {"background": "all"}),
    "routed, text alone in the background": ([[1.0], [1.0]], {}, {"background": "none"}),
    "routed, soft borders": ([[1.0], [1.0]], {}, {"feather": 16}),
}
"""Weights of every person's references, values of the node, values of the router (none: one person, not routed)."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_adapter_gives_the_same_output(case, layout, labs):
    weights, values, router = CASES[case]
    lab, fused = labs(layout)
    people = [lab.identity(seed, tuple(each)) for seed, each in enumerate(weights)]
    routed = lab.routed(people, halves(8 * LATENT[0], 8 * LATENT[1], gap=8), **router) if router else None
    shown = {"identity": people[0]} if routed is None else {"routed": routed}
    patched, report = lab.patch(**shown, **values)
    assert f"{len(lab.sites)} of {len(lab.sites)}" in report
    modes = {name.removeprefix("reference_"): value for name, value in values.items() if name != "strength"}
    fused.settings = replace(fused.settings, **modes)
    call = in_comfyui(lab, patched)
    ours = in_diffusers(lab, fused, call, people, routed, values.get("strength", 1.0))
    assert largest(ours - call.out) < TOLERANCE
    plain = in_comfyui(lab, lab.model)
    assert largest(plain.x - call.x) == 0 and largest(plain.out - call.out) > 20 * TOLERANCE, "the faces must matter"
