"""Copies: the fast search finds exactly what comparing everything with everything finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import prepare_kit as kit
import pytest
from PIL import Image, ImageEnhance

from training.prepare.dedupe import near_copies
from training.prepare.scan import difference_hash


def naive_copies(order: list[int], hashes: list[bytes], distance: int) -> dict[int, int]:
    """{copy: kept}: each picture against all kept ones before it, nearest first."""
    kept: list[int] = []
    copies = {}
    for place in order:
        bits = [(int.from_bytes(hashes[place], "big") ^ int.from_bytes(hashes[k], "big")).bit_count() for k in kept]
        near = min(zip(bits, kept), default=(999, -1))
        if near[0] <= distance:
            copies[place] = near[1]
        else:
            kept.append(place)
    return copies


@pytest.mark.parametrize("distance", [0, 3, 10])
def test_banded_search_equals_comparing_all(distance: int) -> None:
    generator = np.random.default_rng(distance)
    hashes = [generator.bytes(32) for _ in range(40)]
    for _ in range(80):
        bits = np.unpackbits(np.frombuffer(hashes[generator.integers(40)], dtype=np.uint8))
        bits[generator.choice(256, generator.integers(0, 14), replace=False)] ^= 1
        hashes.append(np.packbits(bits).tobytes())
    order = generator.permutation(len(hashes)).tolist()
    found = {copy: kept for copy, kept, _ in near_copies(order, hashes, distance)}
    assert found == naive_copies(order, hashes, distance)
    assert distance == 0 or len(found) > 5


def test_recompressed_and_scaled_copies_are_found_and_the_largest_stays(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    original = Image.fromarray(kit.pixels(3, 200, 160))
    (photos / "a_small.png").write_bytes(kit.encode(original.resize((100, 80)), "PNG"))
    (photos / "b_large.png").write_bytes(kit.encode(original, "PNG"))
    (photos / "c_jpeg.jpg").write_bytes(kit.encode(original, "JPEG", quality=40))
    (photos / "d_bright.png").write_bytes(kit.encode(ImageEnhance.Brightness(original).enhance(1.1), "PNG"))
    (photos / "e_other.png").write_bytes(kit.png(4, 200, 160))
    kit.run(photos, tmp_path / "out")
    assert [row["source"] for row in kit.index(tmp_path / "out")] == ["b_large.png", "e_other.png"]
    assert set(kit.dropped(tmp_path / "out").values()) == {"near_duplicate"}
    kit.run(photos, tmp_path / "all", "dedupe.max_distance=null", "dedupe.exact=false")
    assert len(kit.index(tmp_path / "all")) == 5


def test_hash_of_a_gradient_is_known() -> None:
    falling = np.repeat(np.linspace(255, 0, 170).astype(np.uint8)[None, :, None], 160, axis=0).repeat(3, axis=2)
    assert difference_hash(falling) == b"\xff" * 32
    assert difference_hash(falling[:, ::-1]) == b"\0" * 32
