"""Promises 5, 7 and 9, and METHOD 1.1's limits, in pure tensors."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fusion_kit import Layer, columns, feathered, flash_attend, largest_difference, make_layer, randn
from torch import Tensor

from attention.fusion import (
    COMBINE_MODES,
    FaceControls,
    FaceKeys,
    fused_attention,
    length_term,
    sdpa_attend,
)
from attention.routing import Region
from attention.wide_heads import attend_with_factors

ROUNDING = 2e-6


def with_faces(layer: Layer, faces: list[FaceKeys]) -> Layer:
    return replace(layer, faces=tuple(faces))


def other_face(face: FaceKeys, tokens: int, *, fill: float | None = None) -> FaceKeys:
    """Another reference of the same identity."""
    shape = (1, tokens, face.key.shape[2])
    key, value = (randn(*shape, seed=70 + k) if fill is None else torch.full(shape, fill) for k in (0, 1))
    return replace(face, key=key.to(face.key), value=value.to(face.value))


# Promise 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("combine", COMBINE_MODES)
@pytest.mark.parametrize("background", ["all", "none"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_region_does_not_depend_on_another_identity_s_reference(
    changed: int, background: str, combine: str, dtype: torch.dtype
) -> None:
    masks = columns(3, gap=4)
    layer = make_layer([[6], [4], [5]], masks=masks, background=background, grid=(7, 9), controls=FaceControls(0.7))
    layer = layer.mapped(lambda t: t.to(dtype))
    assert layer.weights is not None
    before = layer.fast(combine)
    for tokens, fill in ((layer.faces[changed].key.shape[1], None), (11, None), (3, torch.nan)):
        faces = [other_face(f, tokens, fill=fill) if f.identity == changed else f for f in layer.faces]
        after = with_faces(layer, faces).fast(combine)
        blind = layer.weights[changed] == 0
        assert torch.equal(after[:, blind], before[:, blind])
        assert not torch.equal(after[:, ~blind], before[:, ~blind])
        others = [i for i in range(3) if i != changed]
        assert bool(blind.any()) and all(bool((layer.weights[i] * blind).any()) for i in others)


def test_no_gradient_reaches_a_reference_from_another_region() -> None:
    layer = make_layer([[6], [4]], masks=columns(2), grid=(4, 8)).mapped(lambda t: t.requires_grad_())
    out = layer.fast()
    assert layer.weights is not None
    mine, theirs = (layer.weights[i] > 0 for i in (0, 1))
    key = layer.faces[1].key
    (from_mine,) = torch.autograd.grad(out[:, mine].sum(), key, retain_graph=True, materialize_grads=True)
    (from_theirs,) = torch.autograd.grad(out[:, theirs].square().sum(), key)
    assert bool((from_mine == 0).all()) and float(from_theirs.abs().max()) > 0


@pytest.mark.parametrize("combine", COMBINE_MODES)
def test_background_without_faces_is_plain_text_attention(combine: str) -> None:
    layer = make_layer([[6], [4]], masks=columns(2, gap=8), background="none", grid=(7, 9))
    assert layer.weights is not None
    background = layer.weights.sum(0) == 0
    plain = sdpa_attend(layer.q, layer.text_key, layer.text_value, layer.heads)
    assert bool(background.any())
    assert torch.allclose(layer.fast(combine)[:, background], plain[:, background], atol=ROUNDING)
    assert not torch.allclose(layer.fast(combine)[:, ~background], plain[:, ~background], atol=0.01)


# Promise 7


@pytest.mark.parametrize("combine", COMBINE_MODES)
def test_order_of_references_does_not_matter(combine: str) -> None:
    layer = make_layer([[6, 3, 4], [5]], masks=columns(2), weight=0.3, grid=(4, 8))
    expected = layer.fast(combine)
    for order in itertools.permutations(range(4)):
        shuffled = with_faces(layer, [layer.faces[i] for i in order])
        assert largest_difference(shuffled.fast(combine), expected) < ROUNDING


@pytest.mark.parametrize("combine", COMBINE_MODES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("background", ["all", "none"])
def test_order_of_identities_with_their_masks_does_not_matter(background: str, soft: bool, combine: str) -> None:
    masks = feathered(columns(3, gap=3)) if soft else columns(3)
    how: dict[str, Any] = {
        "background": background,
        "soft": soft,
        "grid": (5, 10),
    }  # no column border is a token border
    layer = make_layer([[6], [3], [4]], masks=masks, **how)
    expected = layer.fast(combine)
    for order in itertools.permutations(range(3)):
        weights = make_layer([[1]] * 3, masks=masks[list(order)], **how).weights
        faces = [replace(layer.faces[old], identity=new) for new, old in enumerate(order)]
        shuffled = replace(layer, faces=tuple(faces), weights=weights)
        assert largest_difference(shuffled.fast(combine), expected) < ROUNDING


# Promise 9

ROUTED: dict[str, dict[str, Any]] = {
    "no masks": {},
    "hard": {"masks": columns(2, gap=8), "background": "none"},
    "soft": {"masks": feathered(columns(2, gap=8)), "soft": True},
}


@pytest.mark.parametrize("combine", COMBINE_MODES)
@pytest.mark.parametrize("routing", ROUTED.values(), ids=ROUTED)
def test_a_kernel_that_ignores_masks_changes_nothing(routing: dict[str, Any], combine: str) -> None:
    """`flash_attend` cannot take a mask at all; a careless kernel takes one and forgets it."""
    layer = make_layer([[6], [4, 9]], controls=FaceControls(strength=0.3, scale=1.3), **routing)
    masks_seen = []

    def careless(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **options: Any) -> Tensor:
        masks_seen.append((mask, options))
        return sdpa_attend(q, k, v, heads)

    expected = layer.naive(combine)
    assert "mask" not in inspect.signature(flash_attend).parameters
    assert largest_difference(layer.fast(combine, attend=flash_attend), expected) < 1e-5
    assert torch.equal(layer.fast(combine, attend=careless), layer.fast(combine))
    assert masks_seen and all(seen == (None, {}) for seen in masks_seen)


@pytest.mark.parametrize("routing", ROUTED.values(), ids=ROUTED)
def test_a_kernel_gets_whole_heads_of_a_width_it_likes(routing: dict[str, Any]) -> None:
    """Every call is one ordinary attention: matching shapes, contiguous channels, head widths of 8s."""
    layer = make_layer([[6], [4, 9]], heads=3, width=16, controls=FaceControls(strength=0.3), **routing)

    def strict(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        assert heads == 3 and q.dtype == k.dtype == v.dtype
        assert q.shape[0] == k.shape[0] == v.shape[0] == 2
        assert k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[2] % (8 * heads) == 0
        assert all(t.stride(2) == 1 for t in (q, k, v))
        return sdpa_attend(q, k, v, heads)

    assert torch.equal(layer.fast(attend=strict), layer.fast())


def test_a_group_of_equal_terms_is_left_to_the_plain_kernel() -> None:
    """The paper's settings need no extra channels, so the kernel sees the layer's own head width."""
    layer = make_layer([[6], [4, 9]], length="paper")
    widths = []

    def noting(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        widths.append(q.shape[2])
        return sdpa_attend(q, k, v, heads)

    assert largest_difference(layer.fast(attend=noting), layer.naive()) < 1e-5
    assert widths == [10]


def test_extra_channels_are_a_mask_of_rank_f() -> None:
    q, k, v = (randn(2, n, 12, seed=n) for n in (5, 9, 9))
    q_QF, k_KF = randn(5, 3, seed=1), randn(9, 3, seed=2)
    heads = [t.unflatten(2, (2, 6)).transpose(1, 2) for t in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=q_QF @ k_KF.T)
    out = attend_with_factors(q, k, v, q_QF, k_KF, 2, sdpa_attend)
    assert torch.allclose(out, dense.transpose(1, 2).flatten(2), atol=ROUNDING)


# METHOD's limits


def face_share(layer: Layer) -> Tensor:
    """How much of every query's attention goes to faces: values are 0 for text and 1 for faces."""
    faces = [replace(face, value=torch.ones_like(face.value)) for face in layer.faces]
    return replace(layer, text_value=torch.zeros_like(layer.text_value), faces=tuple(faces)).fast()


@pytest.mark.parametrize("combine", COMBINE_MODES)
def test_strength_near_zero_tends_to_text_only(combine: str) -> None:
    text = sdpa_attend(*(getattr(make_layer(), n) for n in ("q", "text_key", "text_value")), 2)
    distances = [
        largest_difference(make_layer(controls=FaceControls(strength=s)).fast(combine), text)
        for s in (1.0, 0.1, 1e-2, 1e-4, 1e-7)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1 and distances[-1] < 1e-6


def test_large_strength_tends_to_faces_only() -> None:
    layer = make_layer(controls=FaceControls(strength=1e7))
    (face,) = layer.faces
    only = sdpa_attend(layer.q, face.key.expand(2, -1, -1), face.value.expand(2, -1, -1), 2)
    assert largest_difference(layer.fast(), only) < 1e-4


@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
def test_strength_multiplies_the_odds_of_the_faces(strength: float) -> None:
    """share / (1 - share) is exactly `strength` times what it is at 1: METHOD's exact re-weighting."""
    one, other = (face_share(make_layer(controls=FaceControls(strength=s))) for s in (1.0, strength))
    assert torch.allclose(other / (1 - other), strength * one / (1 - one), rtol=1e-4)


def test_strength_two_is_every_face_key_twice() -> None:
    layer = make_layer(length="paper")
    twice = with_faces(layer, [*layer.faces, *layer.faces])
    assert largest_difference(replace(layer, controls=FaceControls(strength=2.0)).fast(), twice.fast()) < ROUNDING


@pytest.mark.parametrize("routing", ROUTED.values(), ids=ROUTED)
def test_there_is_one_softmax_its_weights_sum_to_one(routing: dict[str, Any]) -> None:
    controls = FaceControls(strength=0.3, scale=1.5, key_strength=0.5)
    layer = make_layer([[6], [4, 9]], controls=controls, **routing)
    ones = replace(
        layer,
        text_value=torch.ones_like(layer.text_value),
        faces=tuple(replace(face, value=torch.ones_like(face.value)) for face in layer.faces),
    )
    assert torch.allclose(ones.fast(), torch.ones_like(ones.q), atol=ROUNDING)
    sees = torch.ones(30) if ones.weights is None else ones.weights.sum(0).clamp(max=1)
    assert torch.allclose(ones.fast("decoupled"), (1 + 0.3 * sees)[None, :, None].expand(2, -1, 10), atol=ROUNDING)


@pytest.mark.parametrize("combine", COMBINE_MODES)
def test_two_soft_halves_of_one_person_have_no_seam(combine: str) -> None:
    """Weights w and 1 - w of the same face are that face, whatever w: also where both are small or one is tiny."""
    share = torch.tensor([0.0, 1e-7, 1e-4, 5e-4, 0.01, 0.3, 0.5, 0.7, 0.999, 1.0]).repeat(3)
    layer = make_layer(length="paper")
    face = layer.faces[0]
    halves = with_faces(layer, [replace(face, identity=i) for i in (0, 1)])
    split = replace(halves, weights=torch.stack([share, 1.0 - share])).fast(combine)
    assert largest_difference(split, with_faces(layer, [replace(face, identity=0)]).fast(combine)) < ROUNDING


def balanced(num_references: int, tokens: list[Tensor], values: list[Tensor]) -> list[FaceKeys]:
    return [
        FaceKeys(
            k,
            v,
            0,
            length_term("balanced", num_tokens=k.shape[1], num_references=num_references, num_trained=16),
        )
        for k, v in zip(tokens, values)
    ]


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("combine", COMBINE_MODES)
def test_balanced_length_the_same_reference_again_changes_nothing(combine: str, times: int) -> None:
    layer = make_layer()
    key, value = layer.faces[0].key, layer.faces[0].value
    once = with_faces(layer, balanced(1, [key], [value]))
    again = with_faces(layer, balanced(times, [key] * times, [value] * times))
    assert largest_difference(again.fast(combine), once.fast(combine)) < ROUNDING
    finer = with_faces(layer, balanced(1, [key.repeat(1, times, 1)], [value.repeat(1, times, 1)]))
    assert largest_difference(finer.fast(combine), once.fast(combine)) < ROUNDING


def test_paper_length_the_same_reference_again_counts_twice() -> None:
    layer = make_layer(length="paper")
    once, twice = face_share(layer), face_share(with_faces(layer, [*layer.faces, *layer.faces]))
    assert torch.allclose(twice / (1 - twice), 2 * once / (1 - once), rtol=1e-4)


def test_length_term_values() -> None:
    how = {"num_references": 2, "num_trained": 256}
    assert length_term("paper", num_tokens=1024, **how) == 0.0
    assert length_term("balanced", num_tokens=1024, **how) == pytest.approx(-math.log(8))
    assert length_term("balanced", num_tokens=128, **how) == 0.0
    with pytest.raises(ValueError, match=r"unknown length mode 'long'; known: balanced, paper"):
        length_term("long", num_tokens=1, **how)


def test_no_faces_is_the_kernel_itself_bit_for_bit() -> None:
    layer = make_layer([])
    plain = sdpa_attend(layer.q, layer.text_key, layer.text_value, layer.heads)
    assert torch.equal(layer.fast(), plain) and torch.equal(layer.fast("decoupled"), plain)


def test_a_text_span_hides_the_other_text() -> None:
    layer = make_layer()
    inputs = layer.q, layer.text_key, layer.text_value, layer.faces
    span = (Region(None, (0,), text=(2, 5)),)
    short = layer.q, layer.text_key[:, 2:5], layer.text_value[:, 2:5], layer.faces
    assert torch.equal(fused_attention(*inputs, heads=2, regions=span), fused_attention(*short, heads=2))
