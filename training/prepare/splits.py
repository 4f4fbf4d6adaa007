"""Training, validation and test: a fixed draw per person, so that nobody is on both sides."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256

from .config import SplitConfig

logger = logging.getLogger("fusedid")

TRAIN, VAL, TEST = "train", "val", "test"


def assign_splits(keys: Sequence[str], people: Sequence[str], config: SplitConfig) -> list[str]:
    """``train``, ``val`` or ``test`` for each key; ``people`` names who is on it."""
    if config.by == "none":
        return [TRAIN] * len(keys)
    if config.by == "person":
        return [person_split(person, config) for person in people]
    splits = [_regex_split(key, config) for key in keys]
    _warn_of_leaks(splits, people)
    return splits


def person_split(person: str, config: SplitConfig) -> str:
    """A person's split depends only on their name and the seed, so adding photos moves nobody else."""
    digest = sha256(f"{config.seed}|{person}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < config.test:
        return TEST
    return VAL if draw < config.test + config.val else TRAIN


def _regex_split(key: str, config: SplitConfig) -> str:
    if config.test_regex and re.search(config.test_regex, key):
        return TEST
    return VAL if config.val_regex and re.search(config.val_regex, key) else TRAIN


def _warn_of_leaks(splits: Sequence[str], people: Sequence[str]) -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for split, person in zip(splits, people, strict=True):
        seen[person].add(split)
    leaks = sorted(person for person, where in seen.items() if len(where) > 1)
    if leaks:
        logger.warning(
            "%d people are in more than one split (e.g. %s), so validation flatters; split.by=person avoids it",
            len(leaks),
            ", ".join(leaks[:3]),
        )
