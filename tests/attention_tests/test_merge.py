"""Merged reference tokens: nothing at share 1, exact for equal tokens, a small and growing error otherwise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from fusion_kit import Layer, columns, feathered, largest_difference, make_layer, randn
from torch import Tensor

from attention.cache import LayerFeatures
from attention.fusion import FaceControls, FaceKeys, length_term
from attention.merge import SMALL, merge_tokens, merged, num_left
from attention.training_free import statistics

ROUNDING = 5e-6
COMBINE = ["fused", "decoupled"]


def merged_faces(layer: Layer, left: int) -> Layer:
    """Every reference of the layer with so many tokens."""
    faces = []
    for face in layer.faces:
        key, value, log_size = merge_tokens(face.key, face.value, left)
        faces.append(replace(face, key=key, value=value, log_size=log_size))
    return replace(layer, faces=tuple(faces))


def repeated(layer: Layer, times: Sequence[int]) -> Layer:
    """Every token of every reference so many times (in turn), mixed up."""
    faces = []
    for number, face in enumerate(layer.faces):
        counts = torch.tensor([times[i % len(times)] for i in range(face.key.shape[1])])
        order = torch.randperm(int(counts.sum()), generator=torch.Generator().manual_seed(number))
        key, value = (x.repeat_interleave(counts, dim=1)[:, order] for x in (face.key, face.value))
        faces.append(replace(face, key=key, value=value))
    return replace(layer, faces=tuple(faces))


def picture_like(tokens: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values that change smoothly from place to place, in one half with more detail than in the other."""
    side = math.isqrt(tokens)
    calm, busy = (
        torch.nn.functional.interpolate(randn(1, 2 * channels, n, n, seed=seed), (side, side), mode="bicubic")
        for n in (3, 12)
    )
    fine = torch.cat([calm[..., : side // 2], busy[..., side // 2 :]], 3)
    key, value = fine.flatten(2).mT.split(channels, 2)
    return key.contiguous(), value.contiguous()


@pytest.mark.parametrize(("tokens", "share", "left"), [(4096, 1.0, 4096), (4096, 0.5, 2048), (1024, 0.1, 256),
                                                       (256, 0.1, 256), (64, 0.5, 64), (1000, 0.333, 333)])  # fmt: skip
def test_how_many_tokens_are_left(tokens: int, share: float, left: int) -> None:
    assert num_left(tokens, share) == left


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, math.nan])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        num_left(4096, share)


def test_all_tokens_left_is_the_same_object() -> None:
    key, value = randn(1, 300, 4, seed=1), randn(1, 300, 4, seed=2)
    same_key, same_value, log_size = merge_tokens(key, value, 300)
    assert same_key is key and same_value is value and log_size is None
    layer = LayerFeatures(key, value, 9)
    assert merged(layer, 1.0) is layer


@pytest.mark.parametrize("left", [299, 150, 37, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_token_counts_once(left: int, dtype: torch.dtype) -> None:
    """Sizes add up to all tokens, and the size-weighted means are those of all tokens."""
    key, value = randn(1, 300, 6, seed=1).to(dtype), randn(1, 300, 6, seed=2).to(dtype)
    merged_key, merged_value, log_size = merge_tokens(key, value, left)
    assert merged_key.shape == merged_value.shape == (1, left, 6) and merged_key.dtype == dtype
    assert log_size is not None
    sizes = log_size.exp()
    assert float(sizes.sum()) == pytest.approx(300, rel=1e-5) and float(sizes.min()) > 0.99
    for before, after in ((key, merged_key), (value, merged_value)):
        mean = (sizes[:, None] * after[0].float()).sum(0) / 300
        assert largest_difference(mean, before[0].float().mean(0)) < max(ROUNDING, torch.finfo(dtype).eps)


def test_the_same_input_gives_the_same_result_bit_for_bit() -> None:
    key, value = picture_like(1024, 8)
    first, second = (merge_tokens(key.clone(), value.clone(), 400) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("times", [(2,), (1, 3, 5)], ids=str)
def test_merging_equal_tokens_is_exact(combine: str, times: tuple[int, ...]) -> None:
    """Also between others, unlike each other, and whatever their values are: the softmax weighs equal keys alike."""
    layer = repeated(make_layer([[40], [40]], masks=columns(2, gap=4), grid=(7, 9), weight=0.7), times)
    few = merged_faces(layer, 40)
    assert {face.key.shape[1] for face in few.faces} == {40}
    assert largest_difference(few.fast(combine), layer.fast(combine)) < ROUNDING


def test_equal_keys_with_different_values_are_exact_too() -> None:
    layer = repeated(make_layer([[30]]), (4,))
    (face,) = layer.faces
    layer = replace(layer, faces=(replace(face, value=randn(*face.value.shape, seed=9)),))
    assert largest_difference(merged_faces(layer, 30).fast(), layer.fast()) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_promise_2_merged_tokens_are_computed_by_the_formula(
    combine: str, soft: bool, strength: float, dtype: torch.dtype
) -> None:
    masks = feathered(columns(2, gap=4)) if soft else columns(2, gap=4)
    layer = make_layer([[30, 50], [40]], masks=masks, soft=soft, grid=(7, 9), controls=FaceControls(strength))
    few = merged_faces(layer, 17)
    given = few.mapped(lambda t: t.to(dtype))
    wanted = given.mapped(lambda t: t.float()).naive(combine)
    assert largest_difference(given.fast(combine), wanted) < 4 * max(ROUNDING, torch.finfo(dtype).eps)


def test_one_merged_reference_beside_a_whole_one() -> None:
    layer = make_layer([[30], [40]])
    few = merged_faces(layer, 12)
    mixed = replace(layer, faces=(layer.faces[0], few.faces[1]))
    assert largest_difference(mixed.fast(), mixed.naive()) < ROUNDING


def test_the_error_grows_smoothly_as_fewer_tokens_are_left() -> None:
    key, value = picture_like(1024, 40)
    layer = replace(make_layer(heads=2, width=20), faces=(FaceKeys(key, value),))
    wanted = layer.fast()
    errors = []
    for left in (1000, 900, 768, 640, 512, 400, 256, 128, 64):
        out = merged_faces(layer, left).fast()
        errors.append(float((out - wanted).norm() / wanted.norm()))
    assert errors[0] < 1e-3 and errors[4] < 0.03 and errors[-1] < 0.5
    assert all(small <= 1.2 * large for small, large in itertools.pairwise(errors))


def test_merging_is_better_than_leaving_tokens_out_or_pooling_them() -> None:
    key, value = picture_like(1024, 40)
    layer = replace(make_layer(heads=2, width=20), faces=(FaceKeys(key, value),))
    wanted = layer.fast()

    def error(face: FaceKeys) -> float:
        return float((replace(layer, faces=(face,)).fast() - wanted).norm())

    def pooled(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x.mT.unflatten(2, (32, 32)), 2).flatten(2).mT

    ours = error(merged_faces(layer, 256).faces[0])
    assert ours < error(FaceKeys(pooled(key), pooled(value), log_weight=math.log(4)))
    assert ours < error(FaceKeys(key[:, ::4], value[:, ::4], log_weight=math.log(4)))


def test_the_share_of_the_softmax_stays() -> None:
    """All keys equal: whatever is merged, the face gets N tokens' share against the text's."""
    layer = make_layer([[64]], length="paper")
    (face,) = layer.faces
    layer = replace(layer, faces=(replace(face, key=face.key[:, :1].expand(-1, 64, -1)),))
    for left in (63, 20, 1):
        assert largest_difference(merged_faces(layer, left).fast(), layer.fast()) < ROUNDING


def test_the_length_term_counts_merged_tokens_as_what_they_stand_for() -> None:
    key, value = picture_like(1024, 8)
    layer = LayerFeatures(key, value, 1024, statistics(key, key))
    few = merged(layer, 0.5)
    assert few.key.shape[1] == 512 and few.num_tokens == layer.num_tokens == 1024
    assert few.statistics is layer.statistics and few.num_trained == 1024
    assert length_term("balanced", num_tokens=few.num_tokens, num_references=1, num_trained=few.num_trained) == 0.0
    again = merged(few, 0.5)
    assert again.num_tokens == 1024 and again.key.shape[1] == SMALL


def test_promise_7_the_order_of_merged_references_does_not_matter() -> None:
    layer = merged_faces(make_layer([[30, 40, 50]], weight=0.5), 20)
    turned = replace(layer, faces=layer.faces[::-1])
    assert largest_difference(turned.fast(), layer.fast()) < ROUNDING


@pytest.mark.parametrize("combine", COMBINE)
def test_promise_5_a_region_does_not_depend_on_another_merged_reference(combine: str) -> None:
    layer = merged_faces(make_layer([[30], [40]], masks=columns(2), grid=(4, 8)), 10)
    other = replace(layer.faces[1], key=randn(1, 10, 10, seed=8), log_size=randn(10, seed=9))
    changed = replace(layer, faces=(layer.faces[0], other))
    assert layer.weights is not None
    blind = layer.weights[1] == 0
    assert torch.equal(changed.fast(combine)[:, blind], layer.fast(combine)[:, blind])
    assert not torch.equal(changed.fast(combine), layer.fast(combine))
