"""Our tokens equal those of the packs and projects the files come from, whose classes load our files whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import community_files as files
import peer_packs
import pytest
import torch
from torch import Tensor, nn

from attention.community import pulid
from attention.community.faceid import faceid_plus_tokens, faceid_tokens
from attention.community.inputs import FaceInputs
from attention.community.instantid import instantid_tokens
from attention.community.ip_adapter import full_face_tokens, plus_tokens, standard_tokens
from attention.community.recognise import recognise
from attention.community.source import CommunityAdapter, FaceTokens, face_tokens

REFERENCES = 2


def _module(pack: str, file: str) -> ModuleType:
    path: Path = peer_packs.peer_folder(pack) / file
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights(family: str, base: str, depth: int = 4) -> dict[str, Tensor]:
    return files.random_tensors(files.image_proj_shapes(family, base, depth))


def _check(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def _loaded(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights, strict=True)
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["standard", "plus", "full-face", "faceid", "portrait"])
def test_tokens_equal_ipadapter_plus(family: str) -> None:
    theirs = _module("ComfyUI_IPAdapter_plus", "image_proj_models.py")
    weights = _weights(family, "sd15")
    embeds, hidden, face = _draw(REFERENCES, 1024), _draw(REFERENCES, 257, 1280), _draw(REFERENCES, 512)
    if family == "standard":
        _check(standard_tokens(weights, embeds), _loaded(theirs.ImageProjModel(768, 1024, 4), weights)(embeds))
    elif family == "plus":
        module = theirs.Resampler(768, 4, 64, 12, 16, 1280, 768, 4)
        _check(plus_tokens(weights, hidden), _loaded(module, weights)(hidden))
    elif family == "full-face":
        _check(full_face_tokens(weights, hidden), _loaded(theirs.MLPProjModel(768, 1280), weights)(hidden))
    else:
        module = theirs.MLPProjModelFaceId(768, 512, files.TOKENS.get(family, 4))
        _check(faceid_tokens(weights, face), _loaded(module, weights)(face))


@torch.no_grad()
@pytest.mark.parametrize("shortcut", [False, True])
def test_faceid_plus_tokens_equal_ipadapter_plus(shortcut: bool) -> None:
    theirs = _module("ComfyUI_IPAdapter_plus", "image_proj_models.py").ProjModelFaceIdPlus(768, 512, 1280, 4)
    weights = _weights("faceid-plus", "sd15")
    face, hidden = _draw(REFERENCES, 512), _draw(REFERENCES, 257, 1280)
    expected = _loaded(theirs, weights)(face, hidden, scale=0.7, shortcut=shortcut)
    _check(faceid_plus_tokens(weights, face, hidden, shortcut=shortcut, structure=0.7), expected)


@torch.no_grad()
def test_instantid_tokens_equal_its_pack() -> None:
    resampler = _module("ComfyUI_InstantID", "resampler.py").Resampler
    module = resampler(
        dim=1280, depth=4, dim_head=64, heads=20, num_queries=16, embedding_dim=512, output_dim=2048, ff_mult=4
    )
    weights, face = _weights("instantid", "sdxl"), 20 * _draw(REFERENCES, 512)
    _check(instantid_tokens(weights, face), _loaded(module, weights)(face[:, None]))


@torch.no_grad()
def test_pulid_v1_tokens_equal_its_pack() -> None:
    module = _module("PuLID_ComfyUI", "encoders.py").IDEncoder()
    weights = _weights("pulid-v1", "sdxl")
    condition, levels = _draw(REFERENCES, 1280), [_draw(REFERENCES, 9, 1024, seed=i) for i in range(5)]
    expected = _loaded(module, weights)(condition, levels)
    _check(pulid.pulid_v1_tokens(weights, condition, levels, 2048), expected)


@torch.no_grad()
def test_pulid_v11_tokens_equal_its_project() -> None:
    module = _module("PuLID", "pulid/encoders_transformer.py").IDFormer()
    weights = _weights("pulid-v1.1", "sdxl", depth=10)
    condition, levels = _draw(REFERENCES, 1280), [_draw(REFERENCES, 9, 1024, seed=i) for i in range(5)]
    expected = _loaded(module, weights)(condition, levels)
    _check(pulid.pulid_v11_tokens(weights, condition, levels), expected)


def _person(family: str, depth: int = 4) -> tuple[dict[str, Tensor], FaceInputs, FaceTokens]:
    """Weights of an image projection, what it is shown of three photos, and our tokens of the person."""
    shapes = files.file_shapes(family, "sdxl", depth=depth)
    weights = _weights(family, "sdxl", depth)
    adapter = CommunityAdapter(
        family, recognise(shapes, name=family), {f"image_proj.{name}": weight for name, weight in weights.items()}
    )
    seen = {"eva_embed": _draw(3, 768, seed=1), "eva_hidden": tuple(_draw(3, 9, 1024, seed=i) for i in range(5))}
    inputs = FaceInputs(
        embedding=20 * _draw(3, 512), encoder="antelopev2", **(seen if family.startswith("pulid") else {})
    )
    return weights, inputs, face_tokens(adapter, inputs)


@torch.no_grad()
def test_several_photos_through_pulid_v11_are_stacked_as_its_project_does() -> None:
    module = _module("PuLID", "pulid/encoders_transformer.py").IDFormer()
    weights, inputs, tokens = _person("pulid-v1.1", depth=10)
    network = _loaded(module, weights)
    unit = inputs.eva_embed / inputs.eva_embed.norm(2, 1, True)
    photos = [torch.cat([inputs.embedding[i : i + 1], unit[i : i + 1]], -1) for i in range(3)]
    levels = [torch.cat([level[i : i + 1] for i in range(3)], 1) for level in inputs.eva_hidden]
    _check(tokens.positive, network(torch.stack(photos, 1), levels))
    nothing = [torch.zeros_like(level[:1]) for level in inputs.eva_hidden]
    _check(tokens.negative, network(torch.zeros_like(photos[0]), nothing))
    each = network(torch.cat(photos), list(inputs.eva_hidden)).mean(0, keepdim=True)
    assert float((tokens.positive - each).abs().max()) > 0.01


@torch.no_grad()
def test_several_photos_through_pulid_v1_are_joined_as_its_demo_does() -> None:
    """The main photo gives ten tokens, supplementary photos five (without "ID Mix"); so do the zeros of no face."""
    weights, inputs, tokens = _person("pulid-v1")
    network = _loaded(_module("PuLID", "pulid/encoders.py").IDEncoder(), weights)
    unit = inputs.eva_embed / inputs.eva_embed.norm(2, 1, True)
    joined = None
    for i in range(3):
        condition = torch.cat([inputs.embedding[i : i + 1], unit[i : i + 1]], -1)
        levels = [level[i : i + 1] for level in inputs.eva_hidden]
        both = torch.cat([
            network(torch.zeros_like(condition), [torch.zeros_like(level) for level in levels]),
            network(condition, levels),
        ])  # fmt: skip
        joined = both if joined is None else torch.cat([joined, both[:, :5]], 1)
    _check(torch.cat([tokens.negative, tokens.positive]), joined)


@torch.no_grad()
def test_several_photos_through_instantid_are_averaged_as_its_pack_does() -> None:
    resampler = _module("ComfyUI_InstantID", "resampler.py").Resampler
    weights, inputs, tokens = _person("instantid")
    module = resampler(
        dim=1280, depth=4, dim_head=64, heads=20, num_queries=16, embedding_dim=512, output_dim=2048, ff_mult=4
    )
    mean = torch.mean(inputs.embedding[:, None], dim=0)[None]
    _check(tokens.positive, _loaded(module, weights)(mean))
    _check(tokens.negative, module(torch.zeros_like(mean)))
