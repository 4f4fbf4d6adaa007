"""HybridGuidance for several people beside packs that add to the text or repeat its rows, in the real host."""

from __future__ import annotations

import pytest
import torch
from fusion_lab import relative
from guidance_lab import Lab, sample
from peer_standins import add_branch, couple

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def lab(pack, small_models, comfyui) -> Lab:
    return Lab(pack, small_models, comfyui.base)


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
    with pytest.raises(ValueError, match=r"HybridGuidance: another node repeats the rows .*attention couple"):
        sample(couple(out[2], [context]), out[0], out[1])
