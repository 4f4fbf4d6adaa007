"""Chains of MultiIDMaskRouter nodes for the tests: on synthetic people, or on real faces with the test pack."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peer_ours
import torch
from PIL import Image
from torch import Tensor

DIM = 8


def person(pack: Any, name: str = "", embedding: Sequence[float] | None = None) -> Any:
    """An identity made by hand, of an encoder that no file belongs to."""
    identity = pack.submodule("faces.identity")
    fingerprint = identity.EncoderFingerprint("made up", "insightface", "a" * 64, "d" * 64, DIM, "test only")
    vector = np.zeros(DIM, dtype=np.float32) if embedding is None else np.array(embedding, dtype=np.float32)
    vector[0] += embedding is None
    reference = identity.Reference(np.full((32, 32, 3), 99, dtype=np.uint8), vector, None, 0.9)
    return identity.Identity((reference,), fingerprint, name)


def route(pack: Any, identity: Any, **given: Any) -> tuple[Any, Tensor, Any]:
    """One router's outputs (routed, preview, masks)."""
    return peer_ours.run_node(pack.nodes["MultiIDMaskRouter"], identity=identity, **given)


def chain(
    pack: Any, people: Sequence[Any], masks: Sequence[Tensor | None] | None = None, *,
    last: dict[str, Any] | None = None, each: dict[str, Any] | None = None,
) -> tuple[Any, Tensor, Any]:  # fmt: skip
    """A chain with one node per person; `each` goes to every node, `last` to the last one only."""
    outputs: Any = (None,)
    for number, identity in enumerate(people):
        given = {**(each or {}), **((last or {}) if number == len(people) - 1 else {})}
        if masks is not None and masks[number] is not None:
            given["mask"] = masks[number]
        if outputs[0] is not None:
            given["routed"] = outputs[0]
        outputs = route(pack, identity, **given)
    return outputs


def box(rows: slice, columns: slice, size: tuple[int, int] = (64, 96), value: float = 1.0) -> Tensor:
    """MASK `[1, H, W]` with one painted rectangle."""
    mask = torch.zeros(1, *size)
    mask[0, rows, columns] = value
    return mask


def columns(num: int, size: tuple[int, int] = (64, 96)) -> list[Tensor]:
    """Masks that share the picture from left to right."""
    edges = [round(i * size[1] / num) for i in range(num + 1)]
    return [box(slice(None), slice(a, b), size) for a, b in itertools.pairwise(edges)]


def read_image(place: Path) -> Tensor:
    """IMAGE `[1, H, W, 3]` of a file."""
    return torch.from_numpy(np.asarray(Image.open(place).convert("RGB")).astype(np.float32) / 255)[None]


def encoder(pack: Any, assets: Path) -> Any:
    """The real detector and recogniser, at the size that finds the faces of groups."""
    return pack.submodule("faces.pack_choice").open_encoder("test_pack", [assets / "insightface"], det_size=1280)


def faces_of(pack: Any, picture: Tensor, with_encoder: Any) -> list[Any]:
    """The faces the routers find, best score first."""
    array = pack.submodule("nodes.images").image_to_pictures(picture)[0]
    return list(pack.submodule("faces.cache").find_faces_cached(array, with_encoder).faces)


def owners_of_centres(masks: Tensor, picture: Tensor, faces: Sequence[Any]) -> list[list[int]]:
    """For every face the indices of the masks that cover its centre."""
    scale = np.array(masks.shape[:0:-1]) / np.array(picture.shape[2:0:-1])
    points = [(np.array(face.center) * scale).astype(int) for face in faces]
    return [[int(i) for i in (masks[:, y, x] > 0.5).nonzero()[:, 0]] for x, y in points]
