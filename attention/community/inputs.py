"""What community projections are fed with, and the check that everything a family needs is there and of its width."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from . import families as known
from .recognise import Recognised


@dataclass(frozen=True, kw_only=True, eq=False)
class FaceInputs:
    """Features of R references of one person; what the family does not read may be None.

    embedding: raw face embeddings `[R, 512]`. encoder: name of the face pack that made them.
    clip_embeds: projected CLIP image embeddings `[R, D]`. clip_hidden: its penultimate hidden states `[R, n, D]`.
    clip_hidden_blank: the hidden states `[1, n, D]` of a picture that is zero after normalisation, for the
    unconditional tokens. eva_embed: EVA-CLIP image embeddings `[R, 768]`. eva_hidden: its five levels, `[R, n, 1024]`.
    """

    embedding: Tensor | None = None
    encoder: str = ""
    clip_embeds: Tensor | None = None
    clip_hidden: Tensor | None = None
    clip_hidden_blank: Tensor | None = None
    eva_embed: Tensor | None = None
    eva_hidden: tuple[Tensor, ...] = ()


def check_inputs(recognised: Recognised, inputs: FaceInputs, *, name: str) -> None:
    """Raises ValueError, naming model or face pack, when something the family reads is missing or of another width."""
    family = recognised.family
    if family.encoder:
        _check_embedding(recognised, inputs, name)
    if family.clip == "embeds":
        _check_width(recognised, inputs.clip_embeds, name)
    elif family.clip == "hidden":
        _check_width(recognised, inputs.clip_hidden, name)
        _check_width(recognised, inputs.clip_hidden_blank, name)
    elif family.clip == "eva" and (inputs.eva_embed is None or len(inputs.eva_hidden) != known.EVA_LEVELS):
        raise ValueError(
            f"{name} is {family.label}, which reads the EVA-CLIP model {known.EVA}; put {known.EVA_FILE} from "
            f"{known.EVA_SOURCE} into models/clip_vision"
        )


def _check_embedding(recognised: Recognised, inputs: FaceInputs, name: str) -> None:
    family = recognised.family
    if inputs.embedding is None:
        raise ValueError(
            f"{name} is {family.label}, which needs face embeddings of the pack {family.encoder}, but no face was "
            "found in the identity's pictures. Use pictures with a visible face"
        )
    if inputs.embedding.shape[-1] != recognised.embedding_width:
        raise ValueError(
            f"{name} is {family.label} for face embeddings of {recognised.embedding_width} numbers; the identity has "
            f"{inputs.embedding.shape[-1]}. Make the identity with the face pack {family.encoder}"
        )
    if inputs.encoder in (known.BUFFALO, known.ANTELOPE) and inputs.encoder != family.encoder:
        raise ValueError(
            f"{name} is {family.label}, trained with the face pack {family.encoder}, but the identity was made with "
            f"{inputs.encoder}: it would show a stranger. Make the identity with {family.encoder}"
        )


def _check_width(recognised: Recognised, features: Tensor | None, name: str) -> None:
    if features is None:
        raise ValueError(
            f"{name} is {recognised.family.label}, which needs the CLIP vision model {recognised.clip_model}; "
            "connect it to clip_vision"
        )
    if features.shape[-1] != recognised.clip_width:
        raise ValueError(
            f"{name} is {recognised.family.label} for the CLIP vision model {recognised.clip_model} (width "
            f"{recognised.clip_width}), but the connected one has width {features.shape[-1]}. Load the right one"
        )


def entering_embedding(recognised: Recognised, inputs: FaceInputs) -> Tensor:
    """Face embeddings `[R, D]` as the family was trained: of unit length, or raw."""
    assert inputs.embedding is not None
    embedding = inputs.embedding.float()
    return F.normalize(embedding, dim=-1) if recognised.family.unit_embedding else embedding
