"""Promise 2: the fast path is METHOD 1.1-1.4's formula, in values and in gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_kit import Layer, columns, feathered, largest_difference, make_layer, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.fusion import COMBINE_MODES, FaceControls

FP32 = 1e-5


def gradients(compute: Callable[[Layer], Tensor], layer: Layer) -> list[Tensor]:
    """Of a random weighted sum of the output, with respect to every tensor of the layer."""
    leaves = layer.mapped(lambda t: t.detach().clone().requires_grad_())
    out = compute(leaves)
    loss = (out.float() * randn(*out.shape, seed=99)).sum()
    return list(torch.autograd.grad(loss, leaves.tensors, materialize_grads=True))


def assert_same(layer: Layer, combine: str, tolerance: float = FP32) -> None:
    assert largest_difference(layer.fast(combine), layer.naive(combine)) < tolerance
    ours = gradients(lambda it: it.fast(combine), layer)
    theirs = gradients(lambda it: it.naive(combine), layer)
    assert all(bool(torch.isfinite(g).all()) for g in theirs)
    assert max(largest_difference(a, b) for a, b in zip(ours, theirs)) < tolerance
    assert all(float(g.abs().max()) > 0 for g in theirs[:3])


ROUTINGS: dict[str, dict[str, Any]] = {
    "no masks": {},
    "hard, background all": {"masks": columns(2, gap=8)},
    "hard, background none": {"masks": columns(2, gap=8), "background": "none"},
    "soft, background all": {"masks": feathered(columns(2, gap=8)), "soft": True},
    "soft, background none": {"masks": feathered(columns(2, gap=8)), "soft": True, "background": "none"},
}
CONTROLS = {
    "paper": FaceControls(),
    "weak": FaceControls(strength=0.3),
    "strong": FaceControls(strength=4.0),
    "keys and values": FaceControls(key_strength=0.6, value_strength=1.7),
    "scale": FaceControls(scale=1.5),
    "all": FaceControls(strength=0.3, key_strength=1.4, value_strength=0.5, scale=0.7),
}


@pytest.mark.parametrize("combine", COMBINE_MODES)
@pytest.mark.parametrize("controls", CONTROLS.values(), ids=CONTROLS)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_fast_path_equals_naive_formula(routing: dict[str, Any], controls: FaceControls, combine: str) -> None:
    assert_same(make_layer([[6], [4, 9]], controls=controls, weight=0.4, **routing), combine)


@pytest.mark.parametrize("combine", COMBINE_MODES)
@pytest.mark.parametrize("length", ["balanced", "paper"])
@pytest.mark.parametrize("num_references", [1, 2, 4])
def test_fast_path_equals_naive_formula_for_any_number_of_references(
    num_references: int, length: str, combine: str
) -> None:
    assert_same(make_layer([[3, 8, 5, 1][:num_references]], length=length), combine)


@pytest.mark.parametrize("combine", COMBINE_MODES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("people", [1, 2, 3, 4])
def test_fast_path_equals_naive_formula_for_any_number_of_people(people: int, soft: bool, combine: str) -> None:
    masks = columns(people, gap=2)
    masks = feathered(masks) if soft else masks
    assert_same(make_layer([[4, 3], [5], [2], [6, 1]][:people], masks=masks, soft=soft, grid=(4, 9)), combine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("combine", COMBINE_MODES)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_fast_path_equals_naive_formula_to_the_precision_of(
    dtype: torch.dtype, combine: str, routing: dict[str, Any]
) -> None:
    controls = FaceControls(strength=0.3, key_strength=1.2)
    layer = make_layer([[6], [4, 9]], controls=controls, weight=0.4, **routing).mapped(lambda t: t.to(dtype))
    exact = layer.mapped(Tensor.float)  # the same rounded inputs, computed in float32
    out = layer.fast(combine)
    assert out.dtype == dtype
    few_roundings = 3 * torch.finfo(dtype).eps
    assert largest_difference(out, exact.naive(combine)) < few_roundings
    ours = gradients(lambda it: it.fast(combine), layer)
    theirs = gradients(lambda it: it.naive(combine), exact)
    assert max(largest_difference(a, b) for a, b in zip(ours, theirs)) < few_roundings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("term", [-8.3, -3.3, 0.37, 5.1])
def test_terms_cost_half_precision_nothing(dtype: torch.dtype, term: float) -> None:
    """A log weight is not rounded to the layer's dtype: the face's share is right to one rounding of the output."""
    layer = make_layer([[6]], heads=1, width=8, seed=3)
    face = layer.faces[0]
    flat = layer.mapped(torch.zeros_like)  # all scores equal: the share depends on the term alone
    flat.text_value.zero_()
    share = [type(face)(flat.faces[0].key, torch.ones_like(face.value), 0, term)]
    rounded = Layer(flat.q, flat.text_key, flat.text_value, tuple(share), 1).mapped(lambda t: t.to(dtype))
    weight = 6 * torch.tensor(term).exp()
    exact = weight / (7 + weight)
    assert torch.allclose(rounded.fast().float(), exact.expand(2, 30, 8), rtol=1.01 * torch.finfo(dtype).eps, atol=0)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    people = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    references = draw(st.lists(sizes, min_size=people, max_size=people))
    height, width = draw(st.integers(1, 7)), draw(st.integers(4, 9))
    masks = draw(st.sampled_from([None, columns(people), columns(people, gap=4), feathered(columns(people, gap=3))]))
    factor = st.floats(0.05, 5.0)
    return make_layer(
        references,
        grid=(height, width),
        masks=masks,
        background=draw(st.sampled_from(["all", "none"])),
        soft=draw(st.booleans()),
        length=draw(st.sampled_from(["balanced", "paper"])),
        num_trained=draw(st.integers(1, 4096)),
        weight=draw(factor),
        controls=FaceControls(
            draw(factor), draw(st.floats(0.0, 2.0)), draw(st.floats(0.1, 2.0)), draw(st.floats(0.3, 2.0))
        ),
        heads=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 17)),
        text_tokens=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60)
@given(layer=layers(), combine=st.sampled_from(COMBINE_MODES))
def test_fast_path_equals_naive_formula_whatever_is_turned(layer: Layer, combine: str) -> None:
    assert largest_difference(layer.fast(combine), layer.naive(combine)) < FP32


def test_a_reference_may_have_its_own_keys_per_row() -> None:
    layer = make_layer([[6]])
    (face,) = layer.faces
    batched = Layer(
        layer.q,
        layer.text_key,
        layer.text_value,
        (type(face)(randn(2, 6, 10, seed=8), randn(2, 6, 10, seed=9), 0, face.log_weight),),
        layer.heads,
    )
    assert_same(batched, "fused")
    assert_same(batched, "decoupled")
