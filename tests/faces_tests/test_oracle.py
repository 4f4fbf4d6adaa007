"""The insightface package as an oracle: the same pack gives the same faces and embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faces.align import align_face
from faces.boxes import overlap_matrix
from faces.embedding import cosine
from faces.encoder import FaceEncoder


@pytest.fixture(scope="module")
def oracle(assets: Path) -> Any:
    app = pytest.importorskip("insightface.app", reason="insightface is not installed")
    analysis = app.FaceAnalysis(name="test_pack", root=str(assets / "insightface"), providers=["CPUExecutionProvider"])
    analysis.prepare(ctx_id=-1, det_size=(640, 640))
    return analysis


def oracle_faces(oracle: Any, image: np.ndarray) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oracle.get(np.ascontiguousarray(image[:, :, ::-1]))


PICTURES = ("group/solvay_conference_1927.png", "sfhq_sheets/SFHQ_sample_2x4.jpg")


def test_boxes_points_and_embeddings_equal_insightface_s(
    oracle: Any, scrfd_encoder: FaceEncoder, load: Callable[[str], np.ndarray], assets: Path
) -> None:
    portraits = sorted((assets / "faces" / "congress_gpo_450x550").iterdir())[:5]
    for name in [*PICTURES, *(f"congress_gpo_450x550/{path.name}" for path in portraits)]:
        image = load(name)
        theirs, ours = oracle_faces(oracle, image), scrfd_encoder.detect(image, 640, 0.5)
        assert len(theirs) == len(ours), name
        overlaps = overlap_matrix(np.array([f.bbox for f in theirs]), np.array([f.box for f in ours]))
        # insightface scales both axes by the rounded factor of one, so its boxes drift over a wide picture.
        tolerance = max(image.shape) / 400
        for their, our in zip(theirs, (ours[i] for i in overlaps.argmax(axis=1))):
            assert np.abs(their.bbox - our.box).max() < tolerance
            assert np.abs(their.kps - our.keypoints).max() < tolerance
            aligned = align_face(image, their.kps)
            assert cosine(scrfd_encoder.embed(aligned[None])[0], their.embedding) > 0.999


def test_the_fingerprint_says_how_wide_embeddings_are(oracle: Any, scrfd_encoder: FaceEncoder) -> None:
    assert scrfd_encoder.fingerprint.dim == oracle.models["recognition"].output_shape[1] == 128
