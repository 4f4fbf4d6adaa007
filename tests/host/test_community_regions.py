"""Community adapters were trained with tokens of "no face" for negative prompts; regions hold for those rows too."""

from __future__ import annotations

from typing import Any

import fusion_lab
import peer_ours
import pytest
import torch
from fusion_lab import FusionLab, halves, record, relative

from attention.fusion import FaceKeys
from attention.naive import naive_decoupled_attention, naive_fused_attention
from attention.routing import token_weights


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    lab = FusionLab(pack, small_models, "sd15_tiny")
    lab.community = peer_ours.make_scene(pack, small_models, "sd15_tiny").adapter
    return lab


def features(lab: FusionLab, person: Any) -> Any:
    source = lab.pack.submodule("nodes.community_files").load_community_choice(lab.community, "as recognised")
    return lab.pack.submodule("nodes.community_source").community_features(source, lab.sites, person)


@pytest.mark.parametrize("feather", [0, 6])
@pytest.mark.parametrize("background", ["none", "all"])
def test_every_row_sees_in_a_region_what_belongs_there(lab, background, feather):
    """Both prompts by the formula: the positive one's rows see people, the negative one's "no face" in their place."""
    people = [peer_ours.make_identity(lab.pack, 1, seed) for seed in (1, 2)]
    routed = lab.routed(people, halves(gap=16), background=background, feather=feather)
    model, _ = lab.patch(routed=routed, adapter=lab.community, combine="decoupled")
    found = [features(lab, person) for person in people]
    for site in lab.sites[:2]:
        call = record(model, site.key, "attn2", lambda m: lab.call(m))[0]
        weights = token_weights(routed.masks, fusion_lab.grid_of(call), background=background, soft=feather > 0)
        for row, kind in enumerate(call.options["cond_or_uncond"]):
            layers = [(one.positive[0] if kind == 0 else one.negative).layers[site.path] for one in found]
            faces = [FaceKeys(layer.key, layer.value, person) for person, layer in enumerate(layers)]
            q, k, v = (t[row : row + 1] for t in (call.q, call.k, call.v))
            wanted = naive_decoupled_attention(q, k, v, faces, heads=site.heads, weights_IQ=weights)
            assert relative(call.out[row : row + 1], wanted) < 1e-5, (site.path, kind)
            plain = naive_fused_attention(q, k, v, [], heads=site.heads)
            nobody = (weights == 0).all(0)
            assert bool(nobody.any()) == (background == "none")
            assert relative(wanted[:, ~nobody], plain[:, ~nobody]) > 1e-2
            if background == "none":
                torch.testing.assert_close(call.out[row, nobody], plain[0, nobody], atol=1e-5, rtol=1e-5)
