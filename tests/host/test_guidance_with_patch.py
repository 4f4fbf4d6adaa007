"""HybridGuidance and the real FusedIDAttentionPatch on one MODEL, in both orders (METHOD 1.4 and 2.3 at once)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_lab import FusionLab, features_by_hand, grid_of, halves, record, relative, tokens
from guidance_lab import DEFAULTS, STYLE, Vision, write_guidance
from torch import Tensor

from attention.fusion import FaceKeys
from attention.naive import naive_fused_attention
from attention.routing import token_weights

pytestmark = pytest.mark.host

TOKENS = 2
MASKS = halves(gap=8)  # one column of background at 8 x 8 on either side of the middle


@pytest.fixture(scope="module")
def lab(pack, small_models, comfyui) -> FusionLab:
    folder = comfyui.base / "models" / "fusedid"
    write_guidance(folder / "guidance_512.safetensors", face_width=512, face_encoder="a" * 64)
    return FusionLab(pack, small_models)


def people(lab: FusionLab, seeds: tuple[int, int] = (1, 2), **settings: Any) -> Any:
    return lab.routed([lab.identity(seed) for seed in seeds], MASKS, **settings)


def guide(lab: FusionLab, model: Any, routed: Any, background: str = "mean") -> tuple[Any, ...]:
    """HybridGuidance's outputs."""
    inputs = {**DEFAULTS, "background": background, "style_image": STYLE, "clip_vision": Vision(), "routed": routed}
    node = lab.pack.nodes["HybridGuidance"]
    return node.execute(model=model, guidance="guidance_512.safetensors", **inputs).args


def both(lab: FusionLab, routed: Any, *, patch_first: bool, background: str = "mean", **patch: Any) -> tuple[Any, ...]:
    """(MODEL, positive, negative) after both nodes."""
    model = lab.model
    if patch_first:
        model = lab.patch(model, routed=routed, **patch)[0]
    positive, negative, model, *_ = guide(lab, model, routed, background)
    if not patch_first:
        model = lab.patch(model, routed=routed, **patch)[0]
    return model, positive, negative


def first_call(lab: FusionLab, made: tuple[Any, ...], attention: str = "attn2") -> Any:
    model, positive, negative = made
    site = lab.sites[0]
    run = lambda clone: lab.sample(clone, positive=positive, negative=negative, steps=1)  # noqa: E731
    return record(model, site.key, attention, run)[0]


def positive_row(call: Any) -> int:
    return list(call.options["cond_or_uncond"]).index(0)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("background", ["mean", "first"])
def test_regions_of_guidance_and_faces_share_one_softmax(lab, patch_first, background):
    routed = people(lab)
    call = first_call(lab, both(lab, routed, patch_first=patch_first, background=background, length="paper"))
    grid, row = grid_of(call), positive_row(call)
    q, k, v, got = (tensor[row : row + 1] for tensor in (call.q, call.k, call.v, call.out))
    path = lab.sites[0].path
    faces = [
        FaceKeys(*features_by_hand(lab, person)[0][path], identity=i) for i, person in enumerate(routed.identities)
    ]
    weights = token_weights(routed.masks, grid, background="all", soft=False)
    group = torch.full((grid[0] * grid[1],), 2 if background == "mean" else 0)
    for i, mask in enumerate(MASKS):
        group[tokens(mask, grid)] = i
    for g in group.unique().tolist():
        mine, span = group == g, slice(g * TOKENS, (g + 1) * TOKENS)
        expected = naive_fused_attention(
            q, k[:, span], v[:, span], faces, heads=call.options["n_heads"], weights_IQ=weights
        )
        torch.testing.assert_close(got[:, mine], expected[:, mine], atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"combine": "decoupled"}, {"start_percent": 0.5}], ids=str)
def test_the_order_of_the_two_nodes_changes_no_bit(lab, changes):
    """Both orders are the same sums. Sampling enlarges a last bit without bound, so it must not differ at all."""
    routed = people(lab)
    images = []
    for patch_first in (True, False):
        model, positive, negative = both(lab, routed, patch_first=patch_first, **changes)
        images.append(lab.sample(model, positive=positive, negative=negative))
    assert torch.equal(*images)
    assert bool(torch.isfinite(images[0]).all())
    positive, negative, guided, *_ = guide(lab, lab.model, routed)
    alone = lab.sample(guided, positive=positive, negative=negative)
    assert relative(images[0], alone) > 1e-3, "the faces act"


def test_another_persons_face_and_guidance_change_nothing_in_a_region(lab):
    outs = [first_call(lab, both(lab, people(lab, seeds), patch_first=True)) for seeds in ((1, 2), (1, 3))]
    mine = tokens(MASKS[0], grid_of(outs[0]))
    rows = [call.out[positive_row(call)] for call in outs]
    assert torch.equal(rows[0][mine], rows[1][mine])
    assert float((rows[0] - rows[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("adapter", [None, "training-free"])
def test_separation_asked_of_both_nodes_acts_once(lab, adapter):
    """The router hands the same amount to both nodes; the picture is that of one node separating."""
    chosen = {} if adapter is None else {"adapter": adapter, "reference_size": 64}
    apart, free = people(lab, separation=6.0), people(lab)
    images = []
    for for_guidance, for_patch in ((apart, apart), (free, apart), (free, free)):
        positive, negative, model, *_ = guide(lab, lab.model, for_guidance)
        model = lab.patch(model, routed=for_patch, **chosen)[0]
        images.append(lab.sample(model, positive=positive, negative=negative))
    assert relative(images[0], images[1]) < 1e-4, "of the picture's scale, which is far from 1 here"
    assert relative(images[1], images[2]) > 1e-2


def separated_rows(lab: FusionLab, made: tuple[Any, ...]) -> Tensor:
    return first_call(lab, made, "attn1").out


def test_guidance_alone_separates_as_the_patch_does(lab):
    apart = people(lab, separation=6.0)
    positive, negative, model, *_ = guide(lab, lab.model, apart)
    alone = separated_rows(lab, (model, positive, negative))
    with_patch = separated_rows(lab, both(lab, apart, patch_first=False))
    plain = separated_rows(lab, (guide(lab, lab.model, people(lab))[2], positive, negative))
    torch.testing.assert_close(alone, with_patch, atol=1e-5, rtol=1e-5)
    assert float((alone - plain).abs().max()) > 1e-3
