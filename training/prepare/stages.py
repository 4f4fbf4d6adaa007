"""The stages in the order they run."""

from __future__ import annotations

from . import cache, captions, crops, dedupe, filters, find_faces, masks, pack, people, plan, scan
from .stage import Stage

ORDER: tuple[Stage, ...] = (
    scan.STAGE,
    dedupe.STAGE,
    find_faces.STAGE,
    filters.STAGE,
    crops.STAGE,
    masks.STAGE,
    captions.STAGE,
    people.STAGE,
    plan.STAGE,
    pack.STAGE,
    cache.STAGE,
)
BY_NAME = {stage.name: stage for stage in ORDER}
LISTED = ("list", "scan", "dedupe", "faces", "select", "crops", "mask", "captions", "identity")
"""Stages whose shards are those of the list: one row per input, in the same order."""
