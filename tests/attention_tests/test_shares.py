"""The shares are those of the softmax, written out: METHOD 1.1 with its weights summed per identity."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from einops import rearrange
from torch import Tensor

from attention.fusion import PAPER, FaceControls, FaceKeys, decoupled_attention, fused_attention
from attention.routing import regions_from_weights
from attention.shares import attention_shares, output_shares

HEADS, WIDTH, QUERIES, TEXT = 2, 4, 12, 5


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def references(*identities: int, tokens: int = 3) -> list[FaceKeys]:
    size = (1, tokens, HEADS * WIDTH)
    return [
        FaceKeys(randn(*size, seed=10 + n), randn(*size, seed=50 + n), i, 0.3 * n) for n, i in enumerate(identities)
    ]


Q, KEY, VALUE = (randn(2, count, HEADS * WIDTH, seed=n) for n, count in enumerate((QUERIES, TEXT, TEXT)))


def weights_by_hand(faces: list[FaceKeys], weights_IQ: Tensor | None, controls: FaceControls) -> Tensor:
    """`[B, Q, I]`: softmax over text and face keys, summed over the tokens of each identity."""
    keys = torch.cat([KEY, *(controls.key_strength * face.key.expand(2, -1, -1) for face in faces)], 1)
    q, k = (rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in (Q, keys))
    terms = [torch.zeros(QUERIES, TEXT)]
    for face in faces:
        route = torch.zeros(QUERIES) if weights_IQ is None else weights_IQ[face.identity].log()
        terms.append((face.log_weight + math.log(controls.strength) + route)[:, None].expand(-1, face.key.shape[1]))
    attention = torch.softmax(torch.cat(terms, 1) + controls.scale * q @ k.mT / math.sqrt(WIDTH), -1).mean(1)
    people = torch.tensor([-1] * TEXT + [face.identity for face in faces for _ in range(face.key.shape[1])])
    return torch.stack([attention[..., people == i].sum(-1) for i in range(int(people.max()) + 1)], -1)


def layer(faces, weights_IQ=None, controls=PAPER, form=fused_attention):
    regions = None if weights_IQ is None else regions_from_weights(weights_IQ)

    def attention(value: Tensor, faces: list[FaceKeys]) -> Tensor:
        return form(Q, KEY, value, faces, heads=HEADS, regions=regions, controls=controls)

    return attention


SOFT = torch.stack([torch.linspace(0.05, 0.95, QUERIES), torch.linspace(0.95, 0.05, QUERIES)])
HARD = (SOFT > 0.5).float()


@pytest.mark.parametrize("weights", [None, HARD, SOFT], ids=["everywhere", "hard", "soft"])
@pytest.mark.parametrize("controls", [FaceControls(), FaceControls(2.0, 0.7, 1.0, 1.4)], ids=["paper", "turned"])
def test_shares_are_the_softmax_weights(weights, controls):
    faces = references(0, 1, 0)
    found = attention_shares(layer(faces, weights, controls), VALUE, faces, people=2, heads=HEADS)
    torch.testing.assert_close(found, weights_by_hand(faces, weights, controls), atol=1e-5, rtol=1e-4)


def test_more_people_than_a_head_is_wide():
    faces = references(*range(WIDTH + 2))
    found = attention_shares(layer(faces), VALUE, faces, people=WIDTH + 2, heads=HEADS)
    assert found.shape == (2, QUERIES, WIDTH + 2)
    torch.testing.assert_close(found, weights_by_hand(faces, None, FaceControls()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", [fused_attention, decoupled_attention])
def test_in_the_region_of_another_the_share_is_exactly_zero(form):
    faces = references(0, 1)
    attention = layer(faces, HARD, form=form)
    if form is fused_attention:
        shares = attention_shares(attention, VALUE, faces, people=2, heads=HEADS)
    else:
        shares = output_shares(attention, VALUE, faces, people=2)
    assert torch.equal(shares[..., 0][:, HARD[0] == 0], torch.zeros(2, QUERIES // 2))
    assert torch.equal(shares[..., 1][:, HARD[1] == 0], torch.zeros(2, QUERIES // 2))
    assert shares[..., 0][:, HARD[0] == 1].min() > 0 and shares[..., 1][:, HARD[1] == 1].min() > 0


def test_decoupled_shares_are_lengths_of_the_parts():
    """The text's output and each identity's part of the branch add up to the layer; their lengths are compared."""
    faces, controls = references(0, 1), FaceControls(0.6)
    shares = output_shares(layer(faces, None, controls, decoupled_attention), VALUE, faces, people=2)
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in (
        Q, *(torch.cat([getattr(face, kind) for face in faces], 1) for kind in ("key", "value"))))  # fmt: skip
    terms = torch.tensor([face.log_weight for face in faces for _ in range(3)])
    attention = torch.softmax(terms + q @ k.mT / math.sqrt(WIDTH), -1)
    split = [0.6 * rearrange(attention[..., i : i + 3] @ v[..., i : i + 3, :], "b h n d -> b n (h d)") for i in (0, 3)]
    text = fused_attention(Q, KEY, VALUE, (), heads=HEADS)
    whole = partial(decoupled_attention, Q, KEY, VALUE, faces, heads=HEADS, controls=controls)()
    torch.testing.assert_close(text + sum(split), whole, atol=1e-5, rtol=1e-4)
    lengths = torch.stack([part.norm(dim=-1) for part in (text, *split)], -1)
    wanted = lengths[..., 1:] / lengths.sum(-1, keepdim=True)
    torch.testing.assert_close(shares, wanted, atol=1e-5, rtol=1e-4)


def test_a_person_without_references_gets_nothing():
    faces = references(0)
    assert torch.equal(
        attention_shares(layer(faces), VALUE, faces, people=2, heads=HEADS)[..., 1], torch.zeros(2, QUERIES)
    )
    parts = output_shares(layer(faces, form=decoupled_attention), VALUE, faces, people=2)
    assert torch.equal(parts[..., 1], torch.zeros(2, QUERIES))
