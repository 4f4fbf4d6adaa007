"""Mixing follows METHOD 2.2: unit vectors, weights that sum to 1, the encoder's norm again."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faces.embedding import cosine, mix_embeddings, unit
from faces.identity import EncoderFingerprint, Identity, identity_hash, mixed_embedding
from faces.mix import mix_identities, mix_report, require_encoder

MakeIdentity = Callable[..., Identity]


def by_hand(embeddings: np.ndarray, weights: list[float]) -> np.ndarray:
    z = [weight / sum(weights) for weight in weights]
    norms = [float(np.sqrt((e**2).sum())) for e in embeddings]
    total = sum(share * e / norm for share, e, norm in zip(z, embeddings, norms))
    norm = sum(share * norm for share, norm in zip(z, norms))
    return total / np.sqrt((total**2).sum()) * norm


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0.1, 50))
def test_mixing_equals_the_formula(count: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(count, 16)) * rng.uniform(0.5, 30, (count, 1))
    weights = [float(weight) for weight in rng.uniform(0.05, 3, count)]
    mixed = mix_embeddings(embeddings, weights)
    assert mixed.dtype == np.float32
    assert np.allclose(mixed, by_hand(embeddings, weights), rtol=1e-4, atol=1e-4)
    assert np.allclose(mixed, mix_embeddings(embeddings, [weight * scale for weight in weights]), rtol=1e-4, atol=1e-4)


def test_one_face_stays_as_it_is() -> None:
    embedding = np.array([3.0, -4.0, 12.0], dtype=np.float32)
    assert np.allclose(mix_embeddings(embedding[None], [7.0]), embedding, atol=1e-5)


def test_a_long_embedding_has_no_more_say_than_a_short_one() -> None:
    mixed = mix_embeddings(np.array([[10.0, 0.0], [0.0, 2.0]]), [1, 1])
    assert np.allclose(unit(mixed), [np.sqrt(0.5)] * 2, atol=1e-6)
    assert np.linalg.norm(mixed) == pytest.approx(6.0, rel=1e-5)


def test_a_face_of_weight_zero_is_not_in_the_mix() -> None:
    assert np.allclose(mix_embeddings(np.array([[2.0, 0.0], [0.0, 5.0]]), [1, 0]), [2.0, 0.0])


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0], "got 1 weights for 2 faces"),
        ([1.0, -0.5], ">= 0"),
        ([1.0, float("nan")], "finite"),
        ([0.0, 0.0], "all weights are 0"),
    ],
)
def test_bad_weights_are_refused(weights: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mix_embeddings(np.eye(2), weights)


def test_opposite_and_zero_faces_are_refused() -> None:
    with pytest.raises(ValueError, match="cancel each other out"):
        mix_embeddings(np.array([[1.0, 0.0], [-1.0, 0.0]]), [1, 1])
    with pytest.raises(ValueError, match="zero or not finite"):
        mix_embeddings(np.array([[1.0, 0.0], [0.0, 0.0]]), [1, 1])


def test_mixing_identities_gives_each_person_the_share_whatever_the_number_of_photos(
    make_identity: MakeIdentity,
) -> None:
    many = make_identity([1, 0.5, 0, 0], [1, -0.5, 0.2, 0], [1, 0, 0, 0.4], weights=[1, 2, 0.5], name="many")
    one = make_identity([0, 0, 5, 1], name="one")
    parents = np.stack([mixed_embedding(many), mixed_embedding(one)])
    for weights in ([1, 1], [0.2, 0.8], [3, 1]):
        mix = mix_identities([many, one], weights)
        assert np.allclose(unit(mixed_embedding(mix.identity)), unit(mix_embeddings(parents, weights)), atol=1e-5)
        assert mix.shares == pytest.approx([w / sum(weights) for w in weights])
        assert mix.cosines == pytest.approx([cosine(mixed_embedding(mix.identity), p) for p in parents])


def test_order_of_people_and_references_does_not_matter(make_identity: MakeIdentity) -> None:
    people = [make_identity([1, 2, 0, 0], [1, 1, 0, 0]), make_identity([0, 1, 3, 0]), make_identity([0, 0, 1, 1])]
    weights = [1.0, 0.5, 2.0]
    expected = mixed_embedding(mix_identities(people, weights).identity)
    for order in itertools.permutations(range(3)):
        mixed = mix_identities([people[i] for i in order], [weights[i] for i in order])
        assert np.allclose(mixed_embedding(mixed.identity), expected, atol=1e-6)


def test_a_person_of_weight_zero_leaves_no_reference(make_identity: MakeIdentity) -> None:
    mix = mix_identities([make_identity([1, 0, 0, 0]), make_identity([0, 1, 0, 0])], [1, 0])
    assert len(mix.identity.references) == 1
    assert mix.cosines == pytest.approx((1.0, 0.0))


def test_the_report_names_parents_shares_and_cosines(make_identity: MakeIdentity) -> None:
    mix = mix_identities([make_identity([1, 0, 0, 0]), make_identity([0, 1, 0, 0])], [3, 1])
    lines = mix_report(mix, ["Ada", ""]).splitlines()
    assert lines[0] == "Ada: 75% of the mix, cosine 0.949"
    assert lines[1] == "identity 2: 25% of the mix, cosine 0.316"


def test_a_wrong_encoder_is_refused_by_both_names(
    make_identity: MakeIdentity, make_fingerprint: Callable[..., EncoderFingerprint]
) -> None:
    identity = make_identity([1, 0, 0, 0], name="Ada")
    other = make_fingerprint("antelopev2", "b" * 64)
    with pytest.raises(ValueError, match=r"Ada .* stand-in .* antelopev2"):
        require_encoder(identity, other)
    with pytest.raises(ValueError, match=r"stand-in .* antelopev2|antelopev2 .* stand-in"):
        mix_identities([identity, Identity(identity.references, other)], [1, 1])
    renamed = make_fingerprint("renamed", "a" * 64)
    require_encoder(identity, renamed)


def test_the_hash_sees_crops_weights_embeddings_and_encoder_but_no_name(
    make_identity: MakeIdentity, make_fingerprint: Callable[..., EncoderFingerprint]
) -> None:
    base = make_identity([1, 0, 0, 0], [0, 1, 0, 0])
    different = [
        make_identity([1, 0, 0, 0], [0, 1, 0.1, 0]),
        make_identity([1, 0, 0, 0], [0, 1, 0, 0], weights=[1, 2]),
        make_identity([1, 0, 0, 0]),
        Identity(base.references[::-1], base.encoder),
        Identity(base.references, make_fingerprint(digest="c" * 64)),
    ]
    hashes = {identity_hash(identity) for identity in [base, *different]}
    assert len(hashes) == 6
    assert identity_hash(make_identity([1, 0, 0, 0], [0, 1, 0, 0], name="Ada")) == identity_hash(base)


def test_comparing_embeddings_of_two_encoders_is_refused() -> None:
    with pytest.raises(ValueError, match="512 and 128 numbers"):
        cosine(np.ones(512), np.ones(128))
