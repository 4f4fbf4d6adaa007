"""Arithmetic of face embeddings: unit length, cosine, weighted mean (METHOD 2.2). Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SMALLEST_NORM = 1e-6


def unit(embedding: np.ndarray) -> np.ndarray:
    """Scale ``[..., D]`` to length 1, as float32. A zero vector has no direction: ``ValueError``."""
    vectors = np.asarray(embedding, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not np.all(np.isfinite(norms)) or np.any(norms < SMALLEST_NORM):
        raise ValueError(
            "a face embedding is zero or not finite, so it has no direction to compare or mix; "
            "embed the face again with a working encoder"
        )
    return (vectors / norms).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two embeddings ``[D]``, in [-1, 1]. Different lengths mean different encoders: ``ValueError``."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(
            f"cannot compare embeddings of {a.shape[-1]} and {b.shape[-1]} numbers: they come from two different "
            "encoders; embed both faces with the same one"
        )
    return float(np.clip(np.dot(unit(a).astype(np.float64), unit(b).astype(np.float64)), -1.0, 1.0))


def cosine_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines between every row of ``[N, D]`` and every row of ``[M, D]``: float32 ``[N, M]``."""
    return np.clip(unit(a) @ unit(b).T, -1.0, 1.0)


def normalised_weights(weights: Sequence[float], count: int) -> np.ndarray:
    """Weights as float64 ``[count]`` that sum to 1. Negative, non-finite or all-zero weights are a ``ValueError``."""
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (count,):
        raise ValueError(f"got {values.size} weights for {count} faces; give one weight per face")
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"weights must be finite numbers >= 0, got {[float(v) for v in values]}")
    total = values.sum()
    if total <= 0:
        raise ValueError("all weights are 0, so there is nothing to mix; give at least one weight above 0")
    return values / total


def mix_embeddings(embeddings: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Mix ``[N, D]`` with ``N`` weights into float32 ``[D]`` (METHOD 2.2).

    Unit vectors are averaged with weights normalised to sum 1, and the mean is scaled back to the encoder's norm, which
    is taken as the weighted mean of the parents' norms. Raises ``ValueError`` when the parents cancel out.
    """
    vectors = np.asarray(embeddings, dtype=np.float64)
    z = normalised_weights(weights, len(vectors))
    used = z > 0
    vectors, z = vectors[used], z[used]
    direction = z @ unit(vectors).astype(np.float64)
    length = float(np.linalg.norm(direction))
    if length < 1e-4:
        raise ValueError(
            "these faces cancel each other out (their weighted sum is zero), so the mix is nobody; change the weights"
        )
    norm = float(z @ np.linalg.norm(vectors, axis=1))
    return (direction / length * norm).astype(np.float32)
