"""Promises of multi-identity cross-attention (METHOD 2.3) and of self-attention separation."""

from __future__ import annotations

import pytest
import torch

from attention.fusion import FaceKeys, fused_attention, sdpa_attend
from attention.guidance_routing import (
    GUIDANCE_BACKGROUNDS,
    GuidanceRouting,
    guidance_context,
    guidance_groups,
    guidance_regions,
    intersect,
    sampled_mask,
)
from attention.naive import naive_fused_attention
from attention.routing import route, token_weights
from attention.separation import check_amount, memberships, separated_attention

HEADS, C, T = 2, 16, 3
GRID = (6, 8)
Q = GRID[0] * GRID[1]


def two_masks(size: tuple[int, int] = (48, 64)) -> torch.Tensor:
    """One person left, one right, two columns of background between."""
    masks = torch.zeros(2, *size)
    masks[0, :, : size[1] * 3 // 8] = 1
    masks[1, :, size[1] * 5 // 8 :] = 1
    return masks


def projected(seed: int, num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[1, Q, C]` and the keys and values `[num, T, C]` of every identity."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, Q, C, generator=generator)
    return q, torch.randn(num, T, C, generator=generator), torch.randn(num, T, C, generator=generator)


def routed(q, keys, values, masks, background, seed=0) -> torch.Tensor:
    routing = GuidanceRouting(masks, T, background, seed)
    k, v = guidance_context(keys, background), guidance_context(values, background)
    return fused_attention(q, k, v, (), heads=HEADS, regions=guidance_regions(routing, GRID))


@pytest.mark.parametrize("background", GUIDANCE_BACKGROUNDS)
def test_per_region_output_equals_running_that_identity_alone(background):
    q, keys, values = projected(0, 2)
    out = routed(q, keys, values, two_masks(), background)
    owned = guidance_groups(two_masks(), GRID, background="mean")
    for i in range(2):
        mine = owned == i
        alone = sdpa_attend(q, keys[i : i + 1], values[i : i + 1], HEADS)
        torch.testing.assert_close(out[:, mine], alone[:, mine], atol=1e-6, rtol=1e-6)


def test_one_token_makes_a_region_constant_and_more_do_not():
    """A softmax over one key is 1: the paper's single token reaches every pixel of a region alike."""
    q, keys, values = projected(0, 2)
    spread = {}
    for tokens in (1, T):
        routing = GuidanceRouting(two_masks(), tokens, "mean")
        k, v = guidance_context(keys[:, :tokens], "mean"), guidance_context(values[:, :tokens], "mean")
        out = fused_attention(q, k, v, (), heads=HEADS, regions=guidance_regions(routing, GRID))
        mine = guidance_groups(two_masks(), GRID, background="mean") == 0
        spread[tokens] = float(out[0, mine].std(0).max())
    assert spread[1] < 1e-6
    assert spread[T] > 1e-2


def test_another_identitys_guidance_changes_nothing_in_a_region():
    q, keys, values = projected(0, 2)
    before = routed(q, keys, values, two_masks(), "mean")
    values[1] += 100
    after = routed(q, keys, values, two_masks(), "mean")
    mine = guidance_groups(two_masks(), GRID, background="mean") == 0
    assert torch.equal(before[:, mine], after[:, mine])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("background", ["random", "mean", "freeze"])
def test_permuting_identities_with_their_masks_changes_nothing(background):
    q, keys, values = projected(0, 3)
    masks = torch.zeros(3, 48, 64)
    masks[0, :20, :20], masks[1, 10:40, 30:44], masks[2, 30:, 50:] = 1, 1, 1
    order = [2, 0, 1]
    straight = routed(q, keys, values, masks, background, seed=5)
    permuted = routed(q, keys[order], values[order], masks[order], background, seed=5)
    torch.testing.assert_close(straight, permuted, atol=1e-6, rtol=1e-6)


def test_background_mean_attends_to_the_mean_guidance():
    q, keys, values = projected(0, 2)
    out = routed(q, keys, values, two_masks(), "mean")
    free = guidance_groups(two_masks(), GRID, background="mean") == 2
    mean = sdpa_attend(q, keys.mean(0, keepdim=True), values.mean(0, keepdim=True), HEADS)
    assert int(free.sum()) == 12
    torch.testing.assert_close(out[:, free], mean[:, free], atol=1e-6, rtol=1e-6)


def test_background_first_attends_to_the_first_identity():
    groups = guidance_groups(two_masks(), GRID, background="first")
    assert bool((groups.reshape(GRID)[:, 3:5] == 0).all())


def test_background_random_is_seeded_and_uses_everyone():
    draw = lambda seed: guidance_groups(two_masks(), GRID, background="random", seed=seed)  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert set(draw(1).reshape(GRID)[:, 3:5].flatten().tolist()) == {0, 1}
    assert bool((draw(-1).reshape(GRID)[:, :3] == 0).all())


def test_background_freeze_samples_only_the_people():
    masks = two_masks()
    frozen = sampled_mask(masks, "freeze")
    assert torch.equal(frozen[0], masks.sum(0))
    assert torch.equal(sampled_mask(masks, "mean"), torch.ones(1, 48, 64))


def test_context_length_is_what_the_routing_announces():
    tokens = torch.randn(2, T, C)
    for background in GUIDANCE_BACKGROUNDS:
        routing = GuidanceRouting(two_masks(), T, background)
        assert guidance_context(tokens, background).shape == (1, routing.num_keys, C)


def test_every_query_is_in_exactly_one_region():
    for background in GUIDANCE_BACKGROUNDS:
        regions = guidance_regions(GuidanceRouting(two_masks(), T, background, 3), GRID)
        seen = torch.cat([region.queries for region in regions])
        assert sorted(seen.tolist()) == list(range(Q))


def test_a_person_smaller_than_a_cell_keeps_a_cell():
    masks = two_masks()
    masks[1] = 0
    masks[1, 0, 63] = 1
    assert 1 in guidance_groups(masks, (2, 2), background="mean").tolist()


def test_unknown_background_is_refused_with_the_list():
    with pytest.raises(ValueError, match="random, mean, first, freeze"):
        guidance_groups(two_masks(), GRID, background="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("face_background", ["all", "none"])
def test_guidance_regions_and_fused_faces_share_one_exact_softmax(soft, face_background):
    q, keys, values = projected(0, 2)
    masks = two_masks()
    if soft:
        masks[0, :, 20:30] = 0.4
    generator = torch.Generator().manual_seed(9)
    face = lambda i: FaceKeys(*torch.randn(2, 1, 5, C, generator=generator), identity=i, log_weight=0.3 * i)  # noqa: E731
    faces = [face(0), face(1)]
    weights = token_weights(masks, GRID, background=face_background, soft=soft)
    routing = GuidanceRouting(masks, T, "mean")
    regions = intersect(route(masks, GRID, background=face_background, soft=soft), guidance_regions(routing, GRID), Q)
    k, v = guidance_context(keys, "mean"), guidance_context(values, "mean")
    out = fused_attention(q, k, v, faces, heads=HEADS, regions=regions)
    groups = guidance_groups(masks, GRID, background="mean")
    for g in range(3):
        mine, span = groups == g, slice(g * T, (g + 1) * T)
        expected = naive_fused_attention(q, k[:, span], v[:, span], faces, heads=HEADS, weights_IQ=weights)
        torch.testing.assert_close(out[:, mine], expected[:, mine], atol=1e-5, rtol=1e-5)


def test_intersection_with_unrouted_faces_keeps_every_face():
    regions = intersect(
        route(torch.ones(1, 8, 8), GRID), guidance_regions(GuidanceRouting(two_masks(), T, "mean"), GRID), Q
    )
    assert {region.identities for region in regions} == {(0,)}
    assert sorted(region.text for region in regions) == [(0, 3), (3, 6), (6, 9)]


def naive_separated(q, k, v, member_IQ, amount) -> torch.Tensor:
    """The same with a dense bias."""
    same_QK, anyone = member_IQ.T @ member_IQ, member_IQ.sum(0)
    bias = torch.zeros(q.shape[1], k.shape[1])
    bias[:, : q.shape[1]] = -amount * (anyone[:, None] * anyone[None] - same_QK)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("amount", [0.5, 4.0])
def test_separation_equals_the_dense_bias(amount, extra):
    q = projected(0, 1)[0]
    k, v = torch.randn(2, 1, Q + extra, C, generator=torch.Generator().manual_seed(2))
    member = memberships(two_masks(), GRID)
    got = separated_attention(q, k, v, member, amount, heads=HEADS)
    torch.testing.assert_close(got, naive_separated(q, k, v, member, amount), atol=1e-5, rtol=1e-5)


def test_separation_zero_is_plain_attention_bit_for_bit():
    q = projected(0, 1)[0]
    got = separated_attention(q, q, q, memberships(two_masks(), GRID), 0.0, heads=HEADS)
    assert torch.equal(got, sdpa_attend(q, q, q, HEADS))


def test_large_separation_hides_the_other_person_and_leaves_the_background():
    q = projected(0, 1)[0]
    v = q.clone()
    member = memberships(two_masks(), GRID)
    before = separated_attention(q, q, v, member, 20.0, heads=HEADS)
    v[:, member[1] > 0] += 10
    after = separated_attention(q, q, v, member, 20.0, heads=HEADS)
    moved = (after - before).abs().amax(-1)[0]
    assert float(moved[member[0] > 0].max()) < 1e-5
    assert float(moved[member.sum(0) == 0].min()) > 1e-3


@pytest.mark.parametrize("amount", [-1.0, 21.0, float("nan")])
def test_separation_out_of_range_is_refused(amount):
    with pytest.raises(ValueError, match="accepted is 0"):
        check_amount(amount)
