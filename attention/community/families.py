"""The community families we read, and what each needs to see of a face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VIT_H = "CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_BIGG = "CLIP-ViT-bigG-14-laion2B-39B-b160k"
VIT_L = "clip-vit-large-patch14"
EVA = "EVA02-CLIP-L-14-336"
EVA_FILE, EVA_SOURCE = "EVA02_CLIP_L_336_psz14_s6B.pt", "https://huggingface.co/QuanSun/EVA-CLIP"
EVA_WIDTH, EVA_EMBED, EVA_LEVELS = 1024, 768, 5

CLIP_BY_EMBED: Mapping[int, str] = {1024: VIT_H, 1280: VIT_BIGG, 768: VIT_L}
"""Width of the projected image embedding -> model."""
CLIP_BY_HIDDEN: Mapping[int, str] = {1280: VIT_H, 1664: VIT_BIGG, 1024: VIT_L}
"""Width of the hidden states -> model."""

BUFFALO, ANTELOPE = "buffalo_l", "antelopev2"


@dataclass(frozen=True)
class CommunityFamily:
    """One kind of published file.

    name: our id. label: what a user calls it. clip: which CLIP vision output it reads (`embeds`, `hidden`, `eva` or
    none). encoder: the face pack it was trained with, empty when it needs no embedding. unit_embedding: whether the
    embedding enters with length 1 (InsightFace's `normed_embedding`) or raw. together: how the original turns several
    references of a person into one set of tokens (for reports); empty where every reference has a set of its own.
    """

    name: str
    label: str
    clip: str = ""
    encoder: str = ""
    unit_embedding: bool = False
    note: str = ""
    together: str = ""


STANDARD = CommunityFamily("ip-adapter", "IP-Adapter", clip="embeds")
PLUS = CommunityFamily("ip-adapter-plus", "IP-Adapter Plus (or Plus Face)", clip="hidden")
FULL_FACE = CommunityFamily("ip-adapter-full-face", "IP-Adapter Full Face", clip="hidden")
FACEID = CommunityFamily("faceid", "IP-Adapter FaceID", encoder=BUFFALO, unit_embedding=True)
FACEID_PLUS = CommunityFamily(
    "faceid-plus", "IP-Adapter FaceID-Plus", clip="hidden", encoder=BUFFALO, unit_embedding=True
)
FACEID_PLUS_V2 = CommunityFamily(
    "faceid-plus-v2", "IP-Adapter FaceID-PlusV2", clip="hidden", encoder=BUFFALO, unit_embedding=True
)
PORTRAIT = CommunityFamily("faceid-portrait", "IP-Adapter FaceID-Portrait", encoder=BUFFALO, unit_embedding=True)
PORTRAIT_UNNORM = CommunityFamily("faceid-portrait-unnorm", "IP-Adapter FaceID-Portrait unnorm", encoder=BUFFALO)
INSTANTID = CommunityFamily(
    "instantid", "InstantID", encoder=ANTELOPE, note="attention part; its ControlNet is a file and a node of its own",
    together="averaged into one embedding",
)  # fmt: skip
PULID_V1 = CommunityFamily(
    "pulid-v1", "PuLID v1", clip="eva", encoder=ANTELOPE, together="one whole, of the others their identity tokens"
)
PULID_V11 = CommunityFamily(
    "pulid-v1.1", "PuLID v1.1", clip="eva", encoder=ANTELOPE, together="through one encoder call"
)
PULID = (PULID_V1, PULID_V11)

FAMILIES = (
    STANDARD, PLUS, FULL_FACE, FACEID, FACEID_PLUS, FACEID_PLUS_V2, PORTRAIT, PORTRAIT_UNNORM, INSTANTID, PULID_V1,
    PULID_V11,
)  # fmt: skip

VARIANTS: Mapping[str, tuple[CommunityFamily, CommunityFamily]] = {
    "FaceID-PlusV2": (FACEID_PLUS, FACEID_PLUS_V2),
    "FaceID-Portrait unnorm": (INSTANTID, PORTRAIT_UNNORM),
}
"""Stated choice -> (what the tensors look like, what it is): these pairs have equal tensors and differ only in use."""
AS_RECOGNISED = "as recognised"


def choose_variant(family: CommunityFamily, variant: str, *, name: str) -> CommunityFamily:
    """The family after the user's stated choice. Raises ValueError when the choice does not apply to this file."""
    if variant == AS_RECOGNISED:
        return family
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join((AS_RECOGNISED, *VARIANTS))}")
    looks_like, meant = VARIANTS[variant]
    if family != looks_like:
        raise ValueError(
            f"{name} is {family.label}, so it cannot be used as {variant} (that has the tensors of "
            f"{looks_like.label}). Choose {AS_RECOGNISED!r}"
        )
    return meant
