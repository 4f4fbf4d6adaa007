"""Photos of one person by their face embeddings: average linkage inside connected components. Pure numpy and scipy."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

BLOCK = 4096
LARGEST_COMPONENT = 4000
"""Average linkage needs the square of this many cosines."""
STRICTER = 0.05


def cluster(embeddings: np.ndarray, threshold: float) -> np.ndarray:
    """Person number int64 ``[N]`` for embeddings ``[N, D]``, numbered by first appearance.

    Two clusters are one person while the *average* cosine between their members is at least ``threshold``. Single
    links, which chain strangers together, only decide what is looked at together. Needs N² / 2 dot products.
    """
    if not len(embeddings):
        return np.zeros(0, dtype=np.int64)
    unit = _unit(embeddings)
    return renumber(_cluster_places(unit, np.arange(len(unit)), threshold, threshold))


def renumber(labels: np.ndarray) -> np.ndarray:
    """The same partition with labels 0, 1, ... in order of first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse]


def near_pairs(unit: np.ndarray, threshold: float) -> np.ndarray:
    """int64 ``[P, 2]`` of all i < j whose cosine is at least ``threshold``, computed block by block."""
    found = []
    for start in range(0, len(unit), BLOCK):
        for other in range(start, len(unit), BLOCK):
            rows, columns = np.nonzero(unit[start : start + BLOCK] @ unit[other : other + BLOCK].T >= threshold)
            pairs = np.stack([rows + start, columns + other], axis=1)
            found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)


def _cluster_places(unit: np.ndarray, places: np.ndarray, threshold: float, link: float) -> np.ndarray:
    pairs = near_pairs(unit[places], link)
    size = len(places)
    graph = coo_matrix((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    _, components = connected_components(graph, directed=False)
    labels = np.zeros(size, dtype=np.int64)
    order = np.argsort(components, kind="stable")
    start_label = 0
    for members in np.split(order, np.flatnonzero(np.diff(components[order])) + 1):
        parts = _split_component(unit, places[members], threshold, link)
        labels[members] = parts + start_label
        start_label += int(parts.max()) + 1
    return labels


def _split_component(unit: np.ndarray, places: np.ndarray, threshold: float, link: float) -> np.ndarray:
    if len(places) <= 2:
        return np.zeros(len(places), dtype=np.int64)
    if len(places) > LARGEST_COMPONENT and link + STRICTER < 1:
        return _cluster_places(unit, places, threshold, link + STRICTER)
    if len(places) > LARGEST_COMPONENT:
        return np.zeros(len(places), dtype=np.int64)
    distances = 1 - unit[places].astype(np.float64) @ unit[places].astype(np.float64).T
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(np.clip((distances + distances.T) / 2, 0, None), checks=False), method="average")
    return renumber(fcluster(tree, 1 - threshold, criterion="distance"))


def _unit(embeddings: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return (embeddings / np.maximum(norms, 1e-6)).astype(np.float32)
