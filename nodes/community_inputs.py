"""What a community adapter wants to see of an identity: embeddings, CLIP features, EVA-CLIP features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.community import families as known
from ..attention.community.eva_clip import MEAN, STD, EvaTower, look
from ..attention.community.inputs import FaceInputs
from ..attention.community.recognise import Recognised
from ..faces.align import ARCFACE_POINTS, similarity_transform, warp
from ..faces.identity import ALIGNED_SIZE, Identity, Reference, embedded_references

CLIP_FACE = 224
"""Side of the aligned face FaceID-Plus shows to CLIP, pixels."""
EVA_FACE = 512
"""Side of the aligned face PuLID cuts out before it is scaled to the EVA tower's size, pixels."""
EVA_POINTS = np.array(
    [[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41], [313.09, 371.15]], dtype=np.float32
)
"""Where PuLID's face cut-outs have eyes, nose and mouth corners in a 512 px picture (the FFHQ convention)."""
LUMA = (0.299, 0.587, 0.114)


def used_references(recognised: Recognised, identity: Identity) -> tuple[Reference, ...]:
    """The references the family can read: all, or those with a found face where it needs an embedding."""
    return embedded_references(identity) if recognised.family.encoder else identity.references


def face_inputs(
    recognised: Recognised, identity: Identity, *, clip_vision: Any | None = None, eva: EvaTower | None = None
) -> FaceInputs:
    """Features of an identity's references for one family.

    clip_vision: ComfyUI's CLIP_VISION. eva: PuLID's tower. What is missing stays None and is demanded by name by
    `face_tokens`.
    """
    references = used_references(recognised, identity)
    embeddings = [r.embedding for r in references if r.embedding is not None]
    found = FaceInputs(
        embedding=torch.from_numpy(np.stack(embeddings)) if embeddings and recognised.family.encoder else None,
        encoder=identity.encoder.name,
    )
    if recognised.family.clip == "eva":
        return found if eva is None or not embeddings else _with_eva(found, references, eva)
    if not recognised.family.clip or clip_vision is None or not references:
        return found
    return _with_clip(found, recognised, references, clip_vision)


def _with_clip(
    found: FaceInputs, recognised: Recognised, references: Sequence[Reference], clip_vision: Any
) -> FaceInputs:
    pictures = [_clip_picture(recognised, reference) for reference in references]
    outputs = [clip_vision.encode_image(picture) for picture in pictures]
    if recognised.family.clip == "embeds":
        embeds = torch.cat([output["image_embeds"] for output in outputs])
        return FaceInputs(embedding=found.embedding, encoder=found.encoder, clip_embeds=embeds)
    return FaceInputs(
        embedding=found.embedding,
        encoder=found.encoder,
        clip_hidden=torch.cat([output["penultimate_hidden_states"] for output in outputs]),
        clip_hidden_blank=_blank_hidden(clip_vision),
    )


def _clip_picture(recognised: Recognised, reference: Reference) -> Tensor:
    """`[1, H, W, 3]` in [0, 1]: the aligned face for FaceID-Plus, as in its training; the crop for the others."""
    if recognised.family.encoder and reference.keypoints is not None:
        points = ARCFACE_POINTS * (CLIP_FACE / ALIGNED_SIZE)
        return _to_image(_aligned(reference, points, CLIP_FACE))
    return _to_image(reference.crop)


@torch.no_grad()
def _blank_hidden(clip_vision: Any) -> Tensor:
    """Penultimate hidden states `[1, n, D]` of a picture that is zero after CLIP's normalisation.

    Past the host's preprocessing: it rounds to 8 bits, so no picture would come out as zeros.
    """
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    size = int(clip_vision.image_size)
    blank = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    return clip_vision.model(pixel_values=blank, intermediate_output=-2)[1].to(
        comfy.model_management.intermediate_device()
    )


def _with_eva(found: FaceInputs, references: Sequence[Reference], tower: EvaTower) -> FaceInputs:
    pictures = torch.cat([_eva_picture(reference, tower.image_size) for reference in references])
    embed, levels = look(tower, pictures)
    return FaceInputs(embedding=found.embedding, encoder=found.encoder, eva_embed=embed, eva_hidden=levels)


def _eva_picture(reference: Reference, size: int) -> Tensor:
    """`[1, 3, S, S]` normalised: the aligned face in grey, as PuLID shows it (its background is not whitened here)."""
    face = reference.crop if reference.keypoints is None else _aligned(reference, EVA_POINTS, EVA_FACE)
    colours = _to_image(face).movedim(-1, 1)
    grey = (colours * torch.tensor(LUMA)[None, :, None, None]).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    sized = F.interpolate(grey, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
    return (sized - mean) / std


def _aligned(reference: Reference, points: np.ndarray, size: int) -> np.ndarray:
    assert reference.keypoints is not None
    return warp(reference.crop, similarity_transform(reference.keypoints, points), size, size)


def _to_image(picture: np.ndarray) -> Tensor:
    return torch.tensor(picture)[None].float() / 255.0


def encoder_note(recognised: Recognised, identity: Identity) -> str:
    """A line for the report when the face pack is neither the family's own nor one known to be wrong; else empty."""
    wanted, got = recognised.family.encoder, identity.encoder.name
    if not wanted or got in (known.BUFFALO, known.ANTELOPE):
        return ""
    return f"{recognised.family.label} was trained with the face pack {wanted}; the identity's is {got}"
