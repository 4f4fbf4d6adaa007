"""What a person is to this pack: reference crops with embeddings and weights, and the encoder they came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from .embedding import mix_embeddings

ALIGNED_SIZE = 112
SMALLEST_CROP = 16


@dataclass(frozen=True)
class EncoderFingerprint:
    """Which models made an embedding. Two encoders fit together when recogniser and width are equal."""

    name: str
    """What the user chose, e.g. ``buffalo_l``."""
    backend: str
    """``insightface`` or ``opencv``."""
    recogniser_sha256: str
    """Of the recogniser's file; empty when the encoder can only detect."""
    detector_sha256: str
    dim: int
    """Numbers per embedding; 0 when the encoder can only detect."""
    license: str

    def accepts(self, other: EncoderFingerprint) -> bool:
        """Whether embeddings of ``other`` mean the same as ours. The detector may differ."""
        return (self.recogniser_sha256, self.dim) == (other.recogniser_sha256, other.dim)

    def __str__(self) -> str:
        digest = self.recogniser_sha256[:12] or "no recogniser"
        return f"{self.name} ({self.backend}, {self.dim} numbers, {digest})"


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture of a person."""

    crop: np.ndarray
    """uint8 ``[S, S, 3]`` RGB: the face box with a margin, what the reference pass sees."""
    embedding: np.ndarray | None
    """float32 ``[D]``, raw as the recogniser gave it; None when the whole image was used because no face was found."""
    keypoints: np.ndarray | None
    """float32 ``[5, 2]`` in crop pixels."""
    score: float
    """Detection score in [0, 1]; 0 without a found face."""
    weight: float = 1.0
    """Relative share in the mixed embedding, >= 0."""
    aligned: np.ndarray | None = None
    """uint8 ``[112, 112, 3]`` RGB, what the recogniser saw."""

    def __post_init__(self) -> None:
        _check_picture("crop", self.crop, None)
        if self.aligned is not None:
            _check_picture("aligned face", self.aligned, ALIGNED_SIZE)
        if self.embedding is not None:
            _check_floats("embedding", self.embedding, (self.embedding.size,))
        if self.keypoints is not None:
            _check_floats("key points", self.keypoints, (5, 2))
        if not np.isfinite(self.weight) or self.weight < 0:
            raise ValueError(f"a reference's weight must be a finite number >= 0, got {self.weight}")
        if not np.isfinite(self.score):
            raise ValueError(f"a reference's detection score must be a finite number, got {self.score}")


@dataclass(frozen=True, eq=False)
class Identity:
    """One person: one or more references made with one encoder."""

    references: tuple[Reference, ...]
    encoder: EncoderFingerprint
    name: str = ""

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("an identity needs at least one reference picture, got none")
        for number, reference in enumerate(self.references, start=1):
            if reference.embedding is not None and reference.embedding.size != self.encoder.dim:
                raise ValueError(
                    f"reference {number} has {reference.embedding.size} numbers but the encoder "
                    f"{self.encoder} gives {self.encoder.dim}; embed it with that encoder"
                )


def embedded_references(identity: Identity) -> tuple[Reference, ...]:
    """The references that have an embedding (a face was found in them)."""
    return tuple(reference for reference in identity.references if reference.embedding is not None)


def mixed_embedding(identity: Identity) -> np.ndarray:
    """The identity's one embedding, float32 ``[D]``: its references mixed by their weights (METHOD 2.2).

    Raises ``ValueError`` when no reference has an embedding or all that have one weigh 0.
    """
    embedded = embedded_references(identity)
    if not embedded:
        raise ValueError(
            f"the identity {identity.name or '(unnamed)'} has no face embedding: no face was found in its pictures and "
            "they were used whole; use a picture with a visible face"
        )
    stacked = np.stack([reference.embedding for reference in embedded if reference.embedding is not None])
    return mix_embeddings(stacked, [reference.weight for reference in embedded])


def reference_hash(reference: Reference) -> str:
    """sha256 of one reference's content (crop and embedding, not the weight)."""
    digest = hashlib.sha256()
    for array in (reference.crop, reference.embedding):
        if array is None:
            digest.update(b"none")
            continue
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def identity_hash(identity: Identity) -> str:
    """sha256 over recogniser, crops, embeddings and weights, in the references' order; the name does not count."""
    digest = hashlib.sha256(identity.encoder.recogniser_sha256.encode())
    for reference in identity.references:
        digest.update(reference_hash(reference).encode())
        digest.update(np.float64(reference.weight).tobytes())
    return digest.hexdigest()


def _check_picture(what: str, picture: np.ndarray, side: int | None) -> None:
    shape = tuple(np.shape(picture))
    square = len(shape) == 3 and shape[0] == shape[1] and shape[2] == 3
    sized = square and (shape[0] == side if side else shape[0] >= SMALLEST_CROP)
    if not sized or picture.dtype != np.uint8:
        wanted = f"[{side}, {side}, 3]" if side else f"[S, S, 3] with S >= {SMALLEST_CROP}"
        raise ValueError(f"a reference's {what} must be a uint8 array {wanted}, got {picture.dtype} {list(shape)}")


def _check_floats(what: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape or array.size == 0:
        raise ValueError(
            f"a reference's {what} must be float32 {list(shape)} and not empty, got {array.dtype} {list(array.shape)}"
        )
    if not np.all(np.isfinite(array)):
        raise ValueError(f"a reference's {what} contain NaN or infinity; embed the picture again")
