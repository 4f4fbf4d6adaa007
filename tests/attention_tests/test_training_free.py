"""Shared self-attention: the formula, AdaIN's statistics, and that regions keep people apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention.fusion import FaceControls, FaceKeys, fused_attention
from attention.naive import naive_fused_attention
from attention.routing import Region
from attention.training_free import adain, shared_attention, statistics

HEADS, WIDTH, QUERIES = 2, 16, 12


def random(seed: int, tokens: int, rows: int = 2, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, WIDTH, generator=generator) * scale + shift


def own(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return random(seed, QUERIES), random(seed + 1, QUERIES), random(seed + 2, QUERIES)


def face(seed: int, identity: int = 0, tokens: int = 7) -> tuple[FaceKeys, Tensor]:
    """Keys and the queries of the same reference."""
    return FaceKeys(random(seed, tokens, 1), random(seed + 1, tokens, 1), identity), random(
        seed + 2, tokens, 1, 3.0, 1.0
    )


def test_adain_gives_the_mean_and_deviation_it_is_told():
    x, like = random(1, 50), random(2, 30, rows=1, scale=3.0, shift=2.0)
    style = statistics(like, like)
    out = adain(x, style.query_mean, style.query_std)
    assert torch.allclose(out.mean(1), like.mean(1).expand(2, -1), atol=1e-4)
    assert torch.allclose(out.std(1, correction=0), like.std(1, correction=0).expand(2, -1), rtol=1e-3)


def test_adain_with_its_own_statistics_changes_nothing():
    x = random(3, 40, rows=1)
    style = statistics(x, x)
    assert torch.allclose(adain(x, style.query_mean, style.query_std), x, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adain_of_a_constant_channel_is_finite_in_half_precision(dtype):
    x = torch.full((1, 9, 4), 3.0, dtype=dtype)
    style = statistics(random(1, 9, 1)[..., :4].to(dtype), random(2, 9, 1)[..., :4].to(dtype))
    assert bool(torch.isfinite(adain(x, style.query_mean, style.query_std)).all())


def test_everywhere_it_is_the_formula_on_restyled_queries_and_keys():
    q, k, v = own()
    keys, query = face(10)
    style = statistics(query, keys.key)
    out = shared_attention(q, k, v, [keys], [style], heads=HEADS, controls=FaceControls(1.6))
    restyled = [adain(q, style.query_mean, style.query_std), adain(k, style.key_mean, style.key_std)]
    wanted = naive_fused_attention(*restyled, v, [keys], heads=HEADS, controls=FaceControls(1.6))
    assert torch.allclose(out, wanted, atol=1e-5)


def test_two_references_of_one_person_share_the_mean_of_their_statistics():
    q, k, v = own()
    (one, query_one), (two, query_two) = face(10), face(20)
    styles = [statistics(query_one, one.key), statistics(query_two, two.key)]
    a = shared_attention(q, k, v, [one, two], styles, heads=HEADS)
    b = shared_attention(q, k, v, [two, one], styles[::-1], heads=HEADS)
    assert torch.allclose(a, b, atol=1e-5)


def regions() -> list[Region]:
    """A third for each of two people, a third for nobody."""
    thirds = torch.arange(QUERIES).chunk(3)
    return [Region(thirds[0], (0,)), Region(thirds[1], (1,)), Region(thirds[2], ())]


def test_a_region_knows_nothing_of_the_other_person():
    q, k, v = own()
    outs = []
    for other in (20, 30):
        (one, query_one), (two, query_two) = face(10, 0), face(other, 1)
        styles = [statistics(query_one, one.key), statistics(query_two, two.key)]
        outs.append(shared_attention(q, k, v, [one, two], styles, heads=HEADS, regions=regions()))
    first, second, nobody = (region.queries for region in regions())
    assert torch.equal(outs[0][:, first], outs[1][:, first])
    assert torch.equal(outs[0][:, nobody], outs[1][:, nobody])
    assert not torch.allclose(outs[0][:, second], outs[1][:, second], atol=1e-3)


def test_where_nobody_is_it_is_plain_self_attention():
    q, k, v = own()
    keys, query = face(10)
    out = shared_attention(q, k, v, [keys], [statistics(query, keys.key)], heads=HEADS, regions=regions())
    plain = fused_attention(q, k, v, (), heads=HEADS)
    nobody = regions()[2].queries
    assert torch.allclose(out[:, nobody], plain[:, nobody], atol=1e-6)
