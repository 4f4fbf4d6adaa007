"""Guidance regions and fused faces in one softmax, in the real host, whichever patch comes first; and strangers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_lab import relative
from guidance_lab import Lab, sample
from peer_standins import add_branch, couple

from attention.fusion import FaceKeys
from attention.naive import naive_fused_attention
from attention.routing import token_weights

pytestmark = pytest.mark.host

TOKENS = 2  # guidance tokens per person in the lab's file


@pytest.fixture(scope="module")
def lab(pack, small_models, comfyui) -> Lab:
    return Lab(pack, small_models, comfyui.base)


def random_faces(kind: Any, channels: int) -> list[Any]:
    """One reference per person, as `kind` (FaceKeys of the pack or of the tests)."""
    generator = torch.Generator().manual_seed(11)
    draw = [torch.randn(2, 1, 5, channels, generator=generator) for _ in range(2)]
    return [kind(*tensors, identity=i, log_weight=0.2) for i, tensors in enumerate(draw)]


class FaceSlot:
    """A replacement that adds faces as the contract of nodes/guidance_slot.py asks."""

    routes_text = True

    def __init__(self, pack: Any, channels: int, masks: torch.Tensor, previous: Any) -> None:
        self.guidance, self.fusion = pack.submodule("nodes.guidance_slot"), pack.submodule("attention.fusion")
        self.routing, self.previous = pack.submodule("attention.routing"), previous
        self.faces, self.masks, self.regions = random_faces(self.fusion.FaceKeys, channels), masks, {}
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def __deepcopy__(self, _memo: Any) -> FaceSlot:
        return self

    def __call__(self, q, k, v, options):
        grid, heads = tuple(options["activations_shape"][-2:]), options["n_heads"]
        faces = self.regions.setdefault(grid, self.routing.route(self.masks, grid))
        base = self.guidance.text_attention(q, k, v, options)
        out = base.clone()
        for rows, regions in self.guidance.routed_rows(q, options, faces):
            out[rows] = self.fusion.fused_attention(q[rows], k[rows], v[rows], self.faces, heads=heads, regions=regions)
        if self.previous is not None:
            out = self.previous(q, k, v, options) + (out - base)
        self.seen.append((q.clone(), k.clone(), v.clone(), out.clone(), torch.tensor([*grid, heads])))
        return out


def with_faces(pack: Any, model: Any, masks: torch.Tensor) -> tuple[Any, FaceSlot]:
    """A clone whose first cross-attention has faces."""
    clone = model.clone()
    (site, *_) = pack.submodule("attention.sites").discover_sites(clone.model.diffusion_model)
    replaced = clone.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    slot = FaceSlot(pack, site.channels, masks, replaced.get(site.key))
    clone.set_model_attn2_replace(slot, *site.key)
    return clone, slot


@pytest.mark.parametrize("faces_first", [True, False])
@pytest.mark.parametrize("background", ["mean", "first"])
def test_guidance_regions_and_fused_faces_are_one_softmax_in_both_orders(lab, pack, faces_first, background):
    routed = lab.two_people()
    model, slot = with_faces(pack, lab.unet, routed.masks) if faces_first else (lab.unet, None)
    out = lab.styled(model=model, routed=routed, background=background)
    model = out[2]
    if slot is None:
        model, slot = with_faces(pack, model, routed.masks)
    sample(model, out[0], out[1], steps=1)
    q, k, v, got, (h, w, heads) = slot.seen[0]
    positive = (
        0 if float((got[0] - slot.guidance.host_attention(q, k, v, {"n_heads": int(heads)})[0]).abs().max()) else 1
    )
    q, k, v, got = (t[positive : positive + 1] for t in (q, k, v, got))
    weights = token_weights(routed.masks, (int(h), int(w)), background="all", soft=False)
    faces = random_faces(FaceKeys, q.shape[2])
    column = torch.arange(int(w)).repeat(int(h))
    free = 2 if background == "mean" else 0
    group = torch.where(column < 3, 0, torch.where(column >= 5, 1, free))
    for g in group.unique().tolist():
        mine, span = group == g, slice(g * TOKENS, (g + 1) * TOKENS)
        expected = naive_fused_attention(q, k[:, span], v[:, span], faces, heads=int(heads), weights_IQ=weights)
        torch.testing.assert_close(got[:, mine], expected[:, mine], atol=5e-4, rtol=1e-3)


def test_packs_that_add_keep_working_in_both_orders(lab, pack):
    """IPAdapter_plus' protocol: `.add` on what is there, or a predecessor that adds to the text."""
    sites = pack.submodule("attention.sites").discover_sites(lab.unet.model.diffusion_model)
    keys = [site.key[:2] for site in sites]
    after = lab.styled(routed=lab.two_people())
    before = lab.styled(model=add_branch(lab.unet, keys), routed=lab.two_people())
    images = [sample(add_branch(after[2], keys), after[0], after[1]), sample(before[2], before[0], before[1])]
    assert relative(*images) < 1e-4
    plain = sample(after[2], after[0], after[1])
    unrouted = sample(add_branch(lab.unet, keys), after[0], after[1])
    for other in (plain, unrouted):
        assert relative(other, images[0]) > 1e-3


def test_adding_to_a_clone_leaves_the_original_as_it_was(lab, pack):
    sites = pack.submodule("attention.sites").discover_sites(lab.unet.model.diffusion_model)
    out = lab.styled(routed=lab.two_people())
    before = sample(out[2], out[0], out[1])
    add_branch(out[2], [site.key[:2] for site in sites])
    assert torch.equal(sample(out[2], out[0], out[1]), before)


def test_a_node_that_repeats_rows_is_refused_by_name(lab, small_models):
    out = lab.styled(routed=lab.two_people())
    context = small_models.conditioning(tokens=6)[0][0]
    with pytest.raises(ValueError, match="attention couple, ToMe, HyperTile"):
        sample(couple(out[2], [context]), out[0], out[1])
