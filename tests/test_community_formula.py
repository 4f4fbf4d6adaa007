"""Each family's formula, recomputed here in another way, equals our tokens and our `decoupled` attention."""

from __future__ import annotations

import math
from dataclasses import replace

import community_files as files
import pytest
import torch
from torch import Tensor, nn

from attention.community import families as known
from attention.community.inputs import FaceInputs
from attention.community.layers import processor_order
from attention.community.recognise import Recognised, recognise
from attention.community.source import CommunityAdapter, FaceTokens, face_tokens, token_features
from attention.fusion import FaceControls, FaceKeys, decoupled_attention
from attention.sites import SD15_SITES, SDXL_SITES, Site

TOLERANCE = 1e-4
SITES = {"sd15": SD15_SITES, "sdxl": SDXL_SITES}
CASES = [
    ("standard", "sd15", None),
    ("standard", "sdxl", None),
    ("plus", "sd15", None),
    ("plus", "sdxl", None),
    ("full-face", "sd15", None),
    ("faceid", "sd15", None),
    ("faceid", "sdxl", None),
    ("faceid-plus", "sd15", None),
    ("faceid-plus", "sd15", known.FACEID_PLUS_V2),
    ("faceid-plus", "sdxl", known.FACEID_PLUS_V2),
    ("portrait", "sd15", None),
    ("portrait", "sdxl", None),
    ("instantid", "sdxl", None),
    ("instantid", "sdxl", known.PORTRAIT_UNNORM),
    ("pulid-v1", "sdxl", None),
    ("pulid-v1.1", "sdxl", None),
]
RANDOM_LAYERS = (1, 31)  # numbers whose projections are random; the others hold one constant each
REFERENCES = 2


def _constant(number: int) -> float:
    return 0.01 * (1 + number % 7) / 7


def _adapter(family: str, base: str, meant: known.CommunityFamily | None) -> CommunityAdapter:
    depth = {"pulid-v1.1": 5}.get(family, 2 if base == "sd15" else 1)
    shapes = files.file_shapes(family, base, depth=depth)
    found = recognise(shapes, name="synthetic")
    drawn = {
        n: s for n, s in shapes.items() if n.startswith("image_proj.") or n.split(".")[1] in map(str, RANDOM_LAYERS)
    }
    weights = files.random_tensors({n: s for n, s in drawn.items() if "lora" not in n})
    for name, shape in shapes.items():
        if name.endswith("_ip.weight") and name not in weights:
            # Expanded, not stored: 70 real layers would be 1.4 GB.
            weights[name] = torch.full((1, 1), _constant(int(name.split(".")[1]))).expand(shape)
    found = recognise(shapes, name="synthetic") if meant is None else _as(found, meant)
    return CommunityAdapter("synthetic", found, weights)


def _as(found: Recognised, family: known.CommunityFamily) -> Recognised:

    return replace(found, family=family)


def _inputs(adapter: CommunityAdapter) -> FaceInputs:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    clip = adapter.family.clip
    return FaceInputs(
        embedding=20 * draw(REFERENCES, 512),
        encoder=adapter.family.encoder,
        clip_embeds=draw(REFERENCES, 1024) if clip == "embeds" else None,
        clip_hidden=draw(REFERENCES, 257, 1280) if clip == "hidden" else None,
        clip_hidden_blank=draw(1, 257, 1280) if clip == "hidden" else None,
        eva_embed=draw(REFERENCES, 768) if clip == "eva" else None,
        eva_hidden=tuple(draw(REFERENCES, 17, 1024) for _ in range(5)) if clip == "eva" else (),
    )


# --- the formulas once more, with torch modules and loops over heads ---------------------------------------------


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, shares: Tensor | None = None) -> Tensor:
    width = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        columns = slice(h * width, (h + 1) * width)
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(width)
        odds = (scores - scores.amax(-1, keepdim=True)).exp() * (1.0 if shares is None else shares)
        parts.append(odds / odds.sum(-1, keepdim=True) @ v[..., columns])
    return torch.cat(parts, -1)


def _module(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> nn.Module:
    module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return module


def _norm(weights: dict[str, Tensor], name: str) -> nn.Module:
    return _module(nn.LayerNorm(weights[f"{name}.weight"].shape[0]), weights, f"{name}.")


def _perceiver(
    weights: dict[str, Tensor], features: Tensor, latents: Tensor, layer: int, shares: Tensor | None = None
) -> Tensor:
    """shares: of every key, a factor on its part of the softmax."""
    name = f"layers.{layer}.0."
    x, y = _norm(weights, f"{name}norm1")(features), _norm(weights, f"{name}norm2")(latents)
    both = torch.cat([x, y], 1) @ weights[f"{name}to_kv.weight"].T
    inner = both.shape[-1] // 2
    query = y @ weights[f"{name}to_q.weight"].T
    seen = _softmax_attention(query, both[..., :inner], both[..., inner:], inner // 64, shares)
    latents = latents + seen @ weights[f"{name}to_out.weight"].T
    name = f"layers.{layer}.1."
    wide = nn.functional.gelu(_norm(weights, f"{name}0")(latents) @ weights[f"{name}1.weight"].T)
    return latents + wide @ weights[f"{name}3.weight"].T


def _resampled(weights: dict[str, Tensor], features: Tensor, latents: Tensor | None = None) -> Tensor:
    x = features @ weights["proj_in.weight"].T + weights["proj_in.bias"]
    out = weights["latents"].repeat(len(x), 1, 1) if latents is None else latents
    for layer in sorted({int(k.split(".")[1]) for k in weights if k.startswith("layers.")}):
        out = _perceiver(weights, x, out, layer)
    return _norm(weights, "norm_out")(out @ weights["proj_out.weight"].T + weights["proj_out.bias"])


def _mlp(weights: dict[str, Tensor], name: str) -> nn.Module:
    width = weights[f"{name}.6.weight"].shape
    into = weights[f"{name}.0.weight"].shape[1]
    layers = [nn.Linear(into, 1024), nn.LayerNorm(1024), nn.LeakyReLU(), nn.Linear(1024, 1024), nn.LayerNorm(1024)]
    return _module(nn.Sequential(*layers, nn.LeakyReLU(), nn.Linear(1024, width[0])), weights, f"{name}.")


def _expected_tokens(adapter: CommunityAdapter, inputs: FaceInputs) -> Tensor:
    family, context = adapter.family, adapter.recognised.layers.context
    w = {k.removeprefix("image_proj."): v for k, v in adapter.weights.items() if k.startswith("image_proj.")}
    if family == known.STANDARD:
        tokens = inputs.clip_embeds @ w["proj.weight"].T + w["proj.bias"]
        return _norm(w, "norm")(tokens.view(REFERENCES, 4, context))
    if family == known.PLUS:
        return _resampled(w, inputs.clip_hidden)
    if family == known.FULL_FACE:
        layers = nn.Sequential(nn.Linear(1280, 1280), nn.GELU(), nn.Linear(1280, context), nn.LayerNorm(context))
        return _module(layers, w, "proj.")(inputs.clip_hidden)
    raw = inputs.embedding
    unit = raw / raw.norm(dim=1, keepdim=True)
    if family == known.INSTANTID:
        return _resampled(w, raw.mean(0).view(1, 1, 512))
    if family == known.PORTRAIT_UNNORM:
        return _resampled(w, raw.view(REFERENCES, 1, 512))
    if family in (known.PULID_V1, known.PULID_V11):
        return _expected_pulid(w, family, raw, inputs, context)
    layers = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, w["proj.2.weight"].shape[0]))
    tokens = _norm(w, "norm")(_module(layers, w, "proj.")(unit).view(REFERENCES, -1, context))
    if family in (known.FACEID, known.PORTRAIT):
        return tokens
    inner = {k.removeprefix("perceiver_resampler."): v for k, v in w.items() if k.startswith("perceiver_resampler.")}
    seen = _resampled(inner, inputs.clip_hidden, tokens)
    return tokens + seen if family == known.FACEID_PLUS_V2 else seen


def _expected_pulid(
    w: dict[str, Tensor],
    family: known.CommunityFamily,
    raw: Tensor,
    inputs: FaceInputs,
    context: int,
    weights: tuple[float, ...] = (1.0,) * REFERENCES,
) -> Tensor:
    """All references in one row. weights: below 1 for references that count less wherever v1.1's encoder looks."""
    condition = torch.cat([raw, inputs.eva_embed / inputs.eva_embed.norm(dim=1, keepdim=True)], 1)
    if family == known.PULID_V1:
        first = [_mlp(w, "body")(condition[0]).view(5, context)]
        for i, level in enumerate(inputs.eva_hidden):
            patches = torch.stack([_mlp(w, f"mapping_patch_{i}")(patch) for patch in level[0, 1:]])
            first.append((_mlp(w, f"mapping_{i}")(level[0, 0]) + patches.mean(0))[None])
        others = [_mlp(w, "body")(one).view(5, context) for one in condition[1:]]
        return torch.cat([*first, *others])[None]
    identity = torch.cat([_mlp(w, "id_embedding_mapping")(one).view(5, 1024) for one in condition])[None]
    latents = torch.cat([w["latents"], identity], 1)
    depth = len({k.split(".")[1] for k in w if k.startswith("layers.")})
    for layer in range(depth):
        level = layer // (depth // 5)
        seen = torch.cat([_mlp(w, f"mapping_{level}")(one) for one in inputs.eva_hidden[level]])[None]
        per = len(seen[0]) // REFERENCES
        shares = [x for count in (5, per) for x in torch.tensor(weights).repeat_interleave(count).tolist()]
        shares += [1.0] * 32 + torch.tensor(weights).repeat_interleave(5).tolist()
        latents = _perceiver(w, torch.cat([identity, seen], 1), latents, layer, torch.tensor(shares))
    return latents[:, :32] @ w["proj_out"]


# --- the proofs ---------------------------------------------------------------------------------------------------


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=CASES, ids=lambda c: f"{c[2].name if c[2] else c[0]}-{c[1]}", scope="module")
def case(request: pytest.FixtureRequest) -> tuple[CommunityAdapter, FaceInputs, FaceTokens]:
    adapter = _adapter(*request.param)
    inputs = _inputs(adapter)
    return adapter, inputs, face_tokens(adapter, inputs)


@torch.no_grad()
def test_tokens_are_the_familys(case: tuple[CommunityAdapter, FaceInputs, FaceTokens]) -> None:
    adapter, inputs, tokens = case
    assert _relative(tokens.positive, _expected_tokens(adapter, inputs)) < TOLERANCE
    assert tokens.negative.shape == (1, *tokens.positive.shape[1:])
    assert _relative(tokens.negative, tokens.positive[:1]) > 0.05


@torch.no_grad()
def test_decoupled_attention_is_the_familys_formula_at_every_layer(
    case: tuple[CommunityAdapter, FaceInputs, FaceTokens],
) -> None:
    adapter, _, tokens = case
    sites = SITES[adapter.base]
    features = [token_features(adapter, sites, t) for t in tokens.positive]
    assert set(features[0].layers) == {site.path for site in sites}
    for i, site in enumerate(processor_order(sites)):
        number = 2 * i + 1
        keys = [FaceKeys(f.layers[site.path].key, f.layers[site.path].value) for f in features]
        if number in RANDOM_LAYERS:
            _check_site(adapter, site, number, keys, tokens.positive)
        else:
            expected = tokens.positive.sum(-1) * _constant(number)
            got = torch.cat([face.key for face in keys])[..., 0]
            assert _relative(got, expected) < TOLERANCE, site.path


def _check_site(adapter: CommunityAdapter, site: Site, number: int, keys: list[FaceKeys], tokens_RND: Tensor) -> None:
    generator = torch.Generator().manual_seed(number)
    q = torch.randn(2, 12, site.channels, generator=generator)
    text_key, text_value = (torch.randn(2, 7, site.channels, generator=generator) for _ in range(2))
    together = tokens_RND.flatten(0, 1)[None].expand(2, -1, -1)
    weight_k, weight_v = (adapter.weights[f"ip_adapter.{number}.to_{part}_ip.weight"] for part in "kv")
    strength = 0.7
    expected = _softmax_attention(q, text_key, text_value, site.heads)
    expected = expected + strength * _softmax_attention(q, together @ weight_k.T, together @ weight_v.T, site.heads)
    got = decoupled_attention(q, text_key, text_value, keys, heads=site.heads, controls=FaceControls(strength=strength))
    assert _relative(got, expected) < TOLERANCE


def test_structure_is_plus_v2s_weight_of_the_picture() -> None:
    adapter = _adapter("faceid-plus", "sd15", known.FACEID_PLUS_V2)
    inputs = _inputs(adapter)
    none, one, two = (face_tokens(adapter, inputs, structure=s).positive for s in (0.0, 1.0, 2.0))
    torch.testing.assert_close(two - one, one - none, atol=1e-4, rtol=1e-4)
    alone = face_tokens(_adapter("faceid", "sd15", None), inputs).positive
    torch.testing.assert_close(none, alone)


@pytest.mark.parametrize("scaled", [("faceid", "sd15", None), ("instantid", "sdxl", None)])
def test_embeddings_enter_with_the_length_the_family_was_trained_with(scaled: tuple) -> None:
    adapter = _adapter(*scaled)
    inputs = _inputs(adapter)
    doubled = FaceInputs(embedding=2 * inputs.embedding, encoder=inputs.encoder)
    same = torch.allclose(face_tokens(adapter, inputs).positive, face_tokens(adapter, doubled).positive, atol=1e-5)
    assert same == adapter.family.unit_embedding


REFUSED = [
    (("faceid", "sd15", None), {"embedding": None}, "face pack|pack buffalo_l"),
    (("faceid", "sd15", None), {"embedding": torch.zeros(1, 128)}, "512 numbers; the identity has 128"),
    (("faceid", "sd15", None), {"encoder": "antelopev2"}, "trained with the face pack buffalo_l"),
    (("instantid", "sdxl", None), {"encoder": "buffalo_l"}, "trained with the face pack antelopev2"),
    (("plus", "sd15", None), {"clip_hidden": None}, known.VIT_H),
    (("plus", "sd15", None), {"clip_hidden": torch.zeros(1, 257, 1664)}, "connected one has width 1664"),
    (("standard", "sd15", None), {"clip_embeds": None}, known.VIT_H),
    (("pulid-v1", "sdxl", None), {"eva_embed": None}, known.EVA),
]


@pytest.mark.parametrize(("what", "change", "message"), REFUSED)
def test_what_is_missing_or_wrong_is_demanded_by_name(what: tuple, change: dict, message: str) -> None:
    adapter = _adapter(*what)

    with pytest.raises(ValueError, match=message):
        face_tokens(adapter, replace(_inputs(adapter), **change))


@torch.no_grad()
def test_a_pulid_references_weight_is_its_share_wherever_the_encoder_looks() -> None:
    """The largest weight counts as 1; equal weights are the original's plain stacking, weight 0 leaves one out."""
    adapter = _adapter("pulid-v1.1", "sdxl", None)
    inputs, w = _inputs(adapter), {k.removeprefix("image_proj."): v for k, v in adapter.weights.items()}
    got = face_tokens(adapter, inputs, weights=(2.0, 0.5)).positive
    expected = _expected_pulid(w, known.PULID_V11, inputs.embedding, inputs, 2048, (1.0, 0.25))
    plain = face_tokens(adapter, inputs).positive
    assert _relative(got, expected) < TOLERANCE
    assert _relative(plain, expected) > 10 * TOLERANCE
    torch.testing.assert_close(face_tokens(adapter, inputs, weights=(3.0, 3.0)).positive, plain)
    alone = face_tokens(adapter, _first(inputs)).positive
    assert _relative(face_tokens(adapter, inputs, weights=(1.0, 1e-12)).positive, alone) < TOLERANCE


@torch.no_grad()
def test_pulid_v1_weights_its_tokens() -> None:
    adapter = _adapter("pulid-v1", "sdxl", None)
    inputs = _inputs(adapter)
    found = face_tokens(adapter, inputs, weights=(1.0, 0.3), zero_tokens=3)
    assert found.positive.shape == found.negative.shape == (1, 10 + 5 + 3, 2048)
    assert found.log_weight is not None
    expected = torch.tensor([0.0] * 10 + [math.log(0.3)] * 5 + [0.0] * 3)
    torch.testing.assert_close(found.log_weight, expected)
    assert face_tokens(adapter, inputs, weights=(1.0, 1.0)).log_weight is None
    site = processor_order(SITES["sdxl"])[0]
    layer = token_features(adapter, SITES["sdxl"], found.positive[0], found.log_weight).layers[site.path]
    q = torch.randn(1, 6, site.channels, generator=torch.Generator().manual_seed(2))
    nothing = torch.zeros(1, 4, site.channels)
    got = decoupled_attention(
        q, nothing, nothing, [FaceKeys(layer.key, layer.value, log_size=layer.log_size)], heads=site.heads
    )
    wanted = _softmax_attention(q, layer.key, layer.value, site.heads, expected.exp())
    assert _relative(got, wanted) < TOLERANCE


@torch.no_grad()
def test_instantid_averages_by_weights() -> None:
    adapter = _adapter("instantid", "sdxl", None)
    inputs, w = _inputs(adapter), {k.removeprefix("image_proj."): v for k, v in adapter.weights.items()}
    mean = (3 * inputs.embedding[0] + inputs.embedding[1]) / 4
    got = face_tokens(adapter, inputs, weights=(3.0, 1.0)).positive
    assert _relative(got, _resampled(w, mean.view(1, 1, 512))) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", ["pulid-v1", "pulid-v1.1"])
def test_zero_tokens_are_zero_keys_and_values_in_all_rows(family: str) -> None:
    adapter = _adapter(family, "sdxl", None)
    inputs = _inputs(adapter)
    none, eight = face_tokens(adapter, inputs), face_tokens(adapter, inputs, zero_tokens=8)
    for before, after in ((none.positive, eight.positive), (none.negative, eight.negative)):
        torch.testing.assert_close(after[:, :-8], before)
        layers = token_features(adapter, SITES["sdxl"], after[0]).layers.values()
        assert all(not one.key[:, -8:].any() and not one.value[:, -8:].any() for one in layers)


def _first(inputs: FaceInputs) -> FaceInputs:
    return replace(
        inputs,
        embedding=inputs.embedding[:1],
        eva_embed=inputs.eva_embed[:1],
        eva_hidden=tuple(level[:1] for level in inputs.eva_hidden),
    )
