"""What is measured: names in the records, words for the reports, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number of a record. better: +1 when more is better, -1 when less is, 0 when neither."""

    name: str
    label: str
    meaning: str
    better: int = 1


METRICS = (
    Metric("identity", "identity", "cosine to the person's first reference photo; a missed face counts 0"),
    Metric("found", "found", "share of people whose face was found"),
    Metric("identity_found", "identity where found", "the same cosine over found faces only"),
    Metric("identity_multi", "multi-reference", "mean cosine to every real reference photo shown; a miss counts 0"),
    Metric("held_out", "held-out photo", "cosine to a photo that no picture was made from; a miss counts 0"),
    Metric("identity_shown", "to whom was shown", "control rows: cosine to the person whose references were shown", 0),
    Metric("copy_paste", "copy-paste", "1 copies the reference, 0 is as near to the unseen photo", -1),
    Metric("ssim", "SSIM", "aligned 112 px faces, picture against first reference"),
    Metric("psnr", "PSNR dB", "aligned 112 px faces"),
    Metric("psnr_wrapped", "wrapped uint8 PSNR dB", "the same in wrapping 8-bit arithmetic: wrong, for old tables", 0),
    Metric("clip", "CLIP score", "100 x cosine of picture and prompt"),
    Metric("separation", "separation", "cosine to the own person minus the mean cosine to the others in the picture"),
    Metric("leakage", "leakage", "cosine to the others in the picture beyond that to strangers", -1),
    Metric("confidence", "ID-Conf", "1 - second best / best cosine over the people in the picture"),
    Metric("in_place", "in its place", "share of people whose face lies in their band"),
    Metric("count_right", "count right", "share of pictures with as many faces as people"),
    Metric("seconds", "seconds", "per picture, a batch's time shared equally", -1),
)
BY_NAME = {metric.name: metric for metric in METRICS}
DEEPFACE = "deepface_"
"""Prefix of the distances that a network of deepface gave."""


def metric(name: str) -> Metric:
    """The metric of that name, or of a deepface network."""
    if name.startswith(DEEPFACE):
        network = name.removeprefix(DEEPFACE)
        return Metric(name, f"{network} distance", "1 - cosine by deepface; a missed face counts 1", -1)
    return BY_NAME[name]
