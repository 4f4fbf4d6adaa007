"""Clusters, pairs and splits on made-up embeddings."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from training.prepare import clusters
from training.prepare.clusters import cluster, renumber
from training.prepare.config import IdentityConfig, SplitConfig
from training.prepare.people import name_people, repeated_photos
from training.prepare.splits import assign_splits, person_split


def people_embeddings(people: int, photos: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N, 128] and their person numbers; noise 0.9 gives a mean same-person cosine of 0.55."""
    generator = np.random.default_rng(seed)
    centers = generator.standard_normal((people, 128))
    owners = np.repeat(np.arange(people), photos)
    points = centers[owners] + noise * generator.standard_normal((people * photos, 128))
    return (points * generator.uniform(10, 25, (len(points), 1))).astype(np.float32), owners


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(renumber(a), renumber(b)))


@pytest.mark.parametrize("order", [None, 5])
def test_known_people_are_recovered_in_any_order(order: int | None) -> None:
    embeddings, owners = people_embeddings(40, 5, 0.55)
    places = np.arange(len(owners)) if order is None else np.random.default_rng(order).permutation(len(owners))
    assert same_partition(cluster(embeddings[places], 0.55), owners[places])


def test_blocks_and_huge_components_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, owners = people_embeddings(20, 6, 0.5)
    expected = cluster(embeddings, 0.55)
    monkeypatch.setattr(clusters, "BLOCK", 7)
    assert np.array_equal(cluster(embeddings, 0.55), expected)
    monkeypatch.setattr(clusters, "LARGEST_COMPONENT", 10)
    assert same_partition(cluster(embeddings, 0.55), owners)


def test_a_chain_of_likenesses_is_not_one_person() -> None:
    angles = np.radians(np.arange(0, 180, 30))
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = cluster(chain, 0.8)
    assert len(set(labels.tolist())) >= 3
    assert all(np.ptp(np.flatnonzero(labels == label)) <= 1 for label in set(labels.tolist()))


def test_no_faces_no_people() -> None:
    assert cluster(np.zeros((0, 1), dtype=np.float32), 0.5).shape == (0,)


def test_people_from_folders_and_patterns() -> None:
    keys = ["ann/1", "ann/2", "bob/1", "loose"]
    sources = ["ann/1.jpg", "ann/2.jpg", "bob/1.jpg", "loose.jpg"]
    none = np.zeros((4, 2), dtype=np.float32)
    folders = name_people(range(4), none, keys, sources, IdentityConfig(source="folder"))
    assert folders == {"ann": [0, 1], "bob": [2], "loose": [3]}
    numbers = name_people(range(4), none, keys, sources, IdentityConfig(source="regex", regex="/(\\d)"))
    assert numbers == {"1": [0, 2], "2": [1], "loose": [3]}


def test_a_photo_that_comes_back_cropped_is_one_photo() -> None:
    base = np.array([[1.0, 0.0, 0.0], [0.999, 0.02, 0.0], [0.6, 0.8, 0.0], [0.6, 0.79, 0.01]])
    assert repeated_photos(base, np.array([200, 100, 100, 100.0]), 0.99) == {1: 0, 3: 2}
    assert repeated_photos(base, np.array([100, 200, 100, 100.0]), 0.99) == {0: 1, 3: 2}
    assert repeated_photos(base, np.ones(4), 1.0) == {}


def test_split_keeps_people_together_and_hits_the_shares() -> None:
    people = [f"person{number}" for number in range(4000) for _ in range(2)]
    config = SplitConfig(val=0.1, test=0.05, seed=3)
    splits = assign_splits(people, people, config)
    assert splits[::2] == splits[1::2]
    counts = Counter(splits[::2])
    assert counts["val"] == pytest.approx(400, abs=60) and counts["test"] == pytest.approx(200, abs=45)
    assert splits != assign_splits(people, people, SplitConfig(val=0.1, test=0.05, seed=4))


def test_more_people_move_nobody() -> None:
    config = SplitConfig(val=0.2)
    before = {name: person_split(name, config) for name in "abcdefgh"}
    assert {name: person_split(name, config) for name in "abcdefghijkl"}.items() >= before.items()


def test_split_by_pattern() -> None:
    config = SplitConfig(by="regex", val_regex="^val/", test_regex="^test/")
    assert assign_splits(["a", "val/a", "test/b"], ["1", "2", "3"], config) == ["train", "val", "test"]
