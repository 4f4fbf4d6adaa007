"""References and identities refuse what they cannot stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from faces.identity import EncoderFingerprint, Identity, Reference, mixed_embedding

GOOD: dict[str, Any] = {
    "crop": np.zeros((32, 32, 3), dtype=np.uint8),
    "embedding": np.ones(4, dtype=np.float32),
    "keypoints": np.zeros((5, 2), dtype=np.float32),
    "score": 0.9,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"crop": np.zeros((32, 31, 3), dtype=np.uint8)}, r"crop must be a uint8 array \[S, S, 3\]"),
        ({"crop": np.zeros((8, 8, 3), dtype=np.uint8)}, "S >= 16"),
        ({"crop": np.zeros((32, 32, 3), dtype=np.float32)}, "got float32"),
        ({"aligned": np.zeros((111, 111, 3), dtype=np.uint8)}, r"\[112, 112, 3\]"),
        ({"embedding": np.ones(4)}, "must be float32"),
        ({"embedding": np.ones((2, 2), dtype=np.float32)}, "embedding must be float32"),
        ({"embedding": np.empty(0, dtype=np.float32)}, "not empty"),
        ({"embedding": np.array([1, np.nan], dtype=np.float32)}, "NaN"),
        ({"keypoints": np.zeros((4, 2), dtype=np.float32)}, r"float32 \[5, 2\]"),
        ({"weight": -1.0}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"score": float("nan")}, "score"),
    ],
)
def test_bad_references_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Reference(**{**GOOD, **change})


def test_an_identity_needs_a_reference_of_its_encoder_s_width(
    make_fingerprint: Callable[..., EncoderFingerprint],
) -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        Identity((), make_fingerprint())
    with pytest.raises(ValueError, match=r"reference 1 has 4 numbers .* gives 512"):
        Identity((Reference(**GOOD),), make_fingerprint(dim=512))


def test_pictures_without_a_face_do_not_count_in_the_embedding(make_reference: Callable[..., Reference]) -> None:
    fingerprint = EncoderFingerprint("e", "opencv", "r", "d", 3, "MIT")
    face, scenery = make_reference([1, 2, 3]), make_reference(None, weight=5)
    assert np.allclose(mixed_embedding(Identity((scenery, face), fingerprint)), [1, 2, 3], atol=1e-5)
    with pytest.raises(ValueError, match="no face embedding"):
        mixed_embedding(Identity((scenery,), fingerprint))


def test_any_width_of_embedding_works(make_fingerprint: Callable[..., EncoderFingerprint]) -> None:
    for dim in (1, 128, 512, 2048):
        embedding = np.arange(1, dim + 1, dtype=np.float32)
        identity = Identity((Reference(**{**GOOD, "embedding": embedding}),), make_fingerprint(dim=dim))
        assert mixed_embedding(identity).shape == (dim,)
