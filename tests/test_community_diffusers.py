"""Our tokens equal those of diffusers' own reader of IP-Adapter files, where it has one for the family."""

from __future__ import annotations

import community_files as files
import pytest
import torch

from attention.community import families as known
from attention.community.faceid import faceid_plus_tokens, faceid_tokens
from attention.community.ip_adapter import full_face_tokens, plus_tokens, standard_tokens

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def _theirs(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    mixin = pytest.importorskip("diffusers.loaders.unet").UNet2DConditionLoadersMixin
    module = mixin()._convert_ip_adapter_image_proj_to_diffusers(dict(weights), low_cpu_mem_usage=False)
    assert sum(w.numel() for w in module.state_dict().values()) >= sum(w.numel() for w in weights.values())
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    [known.STANDARD, known.PLUS, known.FULL_FACE, known.FACEID, known.FACEID_PLUS, known.FACEID_PLUS_V2],
    ids=lambda family: family.name,
)
def test_tokens_equal_diffusers(family: known.CommunityFamily) -> None:
    kind = {known.STANDARD: "standard", known.PLUS: "plus", known.FULL_FACE: "full-face", known.FACEID: "faceid"}
    shapes = files.image_proj_shapes(kind.get(family, "faceid-plus"), "sd15", depth=4)
    weights = files.random_tensors(shapes)
    module = _theirs(weights)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 257, 1280, generator=generator)
    embeds = torch.randn(2, 1024, generator=generator)
    face = torch.nn.functional.normalize(torch.randn(2, 512, generator=generator), dim=-1)
    if family == known.STANDARD:
        got, expected = standard_tokens(weights, embeds), module(embeds)
    elif family == known.PLUS:
        got, expected = plus_tokens(weights, hidden), module(hidden)
    elif family == known.FULL_FACE:
        got, expected = full_face_tokens(weights, hidden), module(hidden)
    elif family == known.FACEID:
        got, expected = faceid_tokens(weights, face), module(face)
    else:
        module.clip_embeds, module.shortcut = hidden[:, None], family == known.FACEID_PLUS_V2
        got = faceid_plus_tokens(weights, face, hidden, shortcut=module.shortcut)
        expected = module(face)
    torch.testing.assert_close(got, expected.reshape(got.shape), **TOLERANCE)
