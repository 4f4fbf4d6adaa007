"""Every weight type, any mask, equal seeds, any batch: finite, repeatable, and row by row the same as alone."""

from __future__ import annotations

from typing import Any

import fusion_lab
import pytest
import torch
from cases import hostile
from fusion_lab import FusionLab, largest, relative
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

TYPES = ("float32", "float16", "bfloat16", "fp8_e4m3fn", "fp8_e5m2")
ROUNDING = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "fp8_e4m3fn": 1e-5, "fp8_e5m2": 1e-5}
"""Of a row alone against the row in a batch; fp8 weights are computed with in fp32 on the CPU."""


@pytest.fixture(scope="module")
def labs(pack: Any, small_models: Any) -> dict[str, FusionLab]:
    """The small model with its weights in every type."""
    import nodes

    made = {}
    for name in TYPES:
        lab = FusionLab(pack, small_models, "sd15_tiny")
        if name.startswith("fp8"):
            lab.model = nodes.UNETLoader().load_unet(small_models.unet("sd15_tiny").name, name)[0]
        elif name != "float32":
            lab.model = small_models.load_unet("sd15_tiny", dtype=getattr(torch, name))
        made[name] = lab
    return made


@st.composite
def masks(draw: st.DrawFn) -> list[torch.Tensor]:
    """One to four people: boxes, single pixels, gradients, noise, thin lines; touching, nested, overlapping."""
    height, width = draw(st.sampled_from([(64, 64), (8, 8), (1, 1), (72, 104), (500, 500)]))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
        value = draw(st.sampled_from([1.0, 0.5, 0.499, 1e-3, 1e-30, 0.999]))
        mask = torch.zeros(height, width)
        mask[top:bottom, left:right] = value
        kind = draw(st.sampled_from(["box", "box", "gradient", "noise", "inverse"]))
        if kind == "gradient":
            mask = mask * torch.linspace(0, 1, width)
        elif kind == "noise":
            generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
            mask = mask * torch.rand(height, width, generator=generator)
        elif kind == "inverse":
            mask = 1 - mask
        found.append(mask)
    return found


@pytest.mark.parametrize("name", TYPES)
@hostile(2, share=0.01)
@given(given_masks=masks(), feather=st.sampled_from([0, 0, 3, 64]), background=st.sampled_from(["all", "none"]),
       overlap=st.sampled_from(["larger value", "first on top", "last on top"]),
       strength=st.sampled_from([0.05, 1.0, 10.0]), combine=st.sampled_from(["fused", "decoupled"]),
       latent=st.sampled_from([(8, 8), (9, 13)]))  # fmt: skip
def test_no_mask_gives_nan(
    labs: dict[str, FusionLab], name: str, given_masks: list[torch.Tensor], feather: int, background: str, overlap: str,
    strength: float, combine: str, latent: tuple[int, int],
) -> None:  # fmt: skip
    lab = labs[name]
    people = [lab.identity(seed) for seed in range(len(given_masks))]
    try:
        routed = lab.routed(people, given_masks, feather=feather, background=background, overlap=overlap)
    except ValueError as error:  # an empty or wholly covered mask is refused with a reason
        assert str(error).startswith("MultiIDMaskRouter: ")
        assume(False)
    model, _ = lab.patch(lab.model, routed=routed, strength=strength, combine=combine)
    x = fusion_lab.noise(1, latent) * fusion_lab.SIGMA
    once, again = (lab.call(model, latent=x) for _ in range(2))
    assert bool(torch.isfinite(once).all())
    assert torch.equal(once, again), "the same seed gives the same numbers"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("routed", [False, True], ids=["one person", "two people"])
def test_a_row_of_a_batch_is_what_it_is_alone(labs: dict[str, FusionLab], name: str, routed: bool) -> None:
    lab = labs[name]
    settings: dict[str, Any] = {"identity": lab.identity(3)}
    if routed:
        settings = {"routed": lab.routed([lab.identity(3), lab.identity(4)], fusion_lab.halves())}
    model, _ = lab.patch(lab.model, **settings)
    latents = fusion_lab.noise(3, fusion_lab.LATENT, seed=4) * fusion_lab.SIGMA
    together = lab.call(model, latent=latents)
    assert bool(torch.isfinite(together).all())
    for row in range(3):
        assert relative(together[row : row + 1], lab.call(model, latent=latents[row : row + 1])) < ROUNDING[name]


@pytest.mark.parametrize("name", TYPES)
def test_the_same_seed_gives_the_same_picture(labs: dict[str, FusionLab], name: str) -> None:
    lab = labs[name]
    results = [lab.sample(lab.patch(lab.model, identity=lab.identity(3))[0], seed=5) for _ in range(2)]
    assert torch.equal(*results)
    other = lab.sample(lab.patch(lab.model, identity=lab.identity(3))[0], seed=6)
    assert largest(results[0] - other) > 1e-3


def test_large_activations_in_half_precision_stay_finite(labs: dict[str, FusionLab]) -> None:
    """As some checkpoints have them: what the host's attention bears, ours must bear too."""
    lab = labs["float16"]
    model, _ = lab.patch(lab.model, identity=lab.identity(3), strength=10.0)
    (call,) = lab.calls_at(model, lab.sites[0], steps=1)
    slot = lab.pack.submodule("nodes.host.slot").Slot("attn2", lab.sites[0])
    q, k, v = torch.full_like(call.q, 100.0).half(), call.k.half() * 10, call.v.half() * 100
    out = slot(q, k, v, call.options)
    assert out.dtype == torch.float16 and bool(torch.isfinite(out).all())
    assert relative(out.float(), call.out.float()) > 0.1


class Doubles(TorchDispatchMode):
    """Counts results in double precision, which Apple's MPS does not have: there each would be an error."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else [out]
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in results):
            self.found.append(str(function))
        return out


@pytest.mark.parametrize("inputs", [{}, {"strength": 1.7, "length": "balanced"}, {"adapter": "training-free"}])
def test_the_patch_needs_no_double_precision(labs: dict[str, FusionLab], inputs: dict[str, Any]) -> None:
    lab = labs["float32"]
    routed = lab.routed([lab.identity(3), lab.identity(4)], fusion_lab.halves(gap=8), feather=5)
    patched, _ = lab.patch(routed=routed, **inputs)
    counts = []
    for model in (lab.model, patched):
        with Doubles() as doubles:
            lab.call(model)
        counts.append(sorted(doubles.found))
    assert counts[0] == counts[1]
