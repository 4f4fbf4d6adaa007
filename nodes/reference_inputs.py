"""From an identity's crops and a text encoder to what the reference pass takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..attention.adapter import FusionAdapter
from ..attention.grid import LATENT_SCALE
from ..attention.sites import Site
from .face_sources import tensor_fingerprint
from .fusion_plan import Shown, shown_references
from .reference import ReferenceLatent, ReferenceText


def reference_latents(
    model: Any, vae: Any, people: tuple[Any, ...], size: int
) -> tuple[tuple[ReferenceLatent, ...], tuple[Shown, ...]]:
    """Every used reference of every person, VAE-encoded at `size` pixels, and whose it is.

    Raises ValueError without a VAE, for a VAE of another kind, or when no reference has a weight.
    """
    if vae is None:
        raise ValueError("'vae' is not connected: the reference face is encoded with the model's own VAE. Connect it")
    used = [(number, one) for number, person in enumerate(people) for one in person.references if one.weight > 0]
    empty = sorted(set(range(len(people))) - {number for number, _ in used})
    if empty:
        raise ValueError(f"every reference of identity {empty[0] + 1} has weight 0; give one a weight above 0")
    latents = tuple(_encoded(model, vae, one.crop, size) for _, one in used)
    return latents, shown_references([(number, float(one.weight), 1) for number, one in used])


def _encoded(model: Any, vae: Any, crop: np.ndarray, size: int) -> ReferenceLatent:
    latent = vae.encode(_pixels(crop, size))
    if latent.ndim != 4 or latent.shape[1] != 4:
        raise ValueError(
            f"the VAE gave a latent of shape {list(latent.shape)}, an SD model takes 4 channels; connect its own VAE"
        )
    if not bool(torch.isfinite(latent).all()):
        raise ValueError("the VAE gave NaN for the reference face; run it in fp32 (--fp32-vae) or use another VAE")
    latent = model.model.process_latent_in(latent.float())
    return ReferenceLatent(latent, tensor_fingerprint(latent))


def _pixels(crop: np.ndarray, size: int) -> torch.Tensor:
    side = max(LATENT_SCALE, size // LATENT_SCALE * LATENT_SCALE)
    resized = Image.fromarray(crop).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)[None]


def reference_text(adapter: FusionAdapter | None, clip: Any, sites: tuple[Site, ...]) -> ReferenceText:
    """The empty prompt of the reference pass: from `clip`, else from the adapter, else zeros, and the label says which.

    Raises ValueError when the text encoder belongs to another family than the model.
    """
    if clip is not None:
        context, pooled = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)
        label = "the empty prompt"
    elif adapter is not None and adapter.prompt_context is not None:
        context, pooled, label = adapter.prompt_context[None], adapter.prompt_pooled, "the adapter's empty prompt"
        pooled = None if pooled is None else pooled.reshape(1, -1)
    else:
        context, pooled, label = torch.zeros(1, 77, sites[0].context), None, "zeros (connect clip for the empty prompt)"
    if context.shape[-1] != sites[0].context:
        raise ValueError(
            f"the text encoder gives {context.shape[-1]} numbers per token, the model takes {sites[0].context}. "
            "Connect the CLIP that belongs to the model"
        )
    return ReferenceText(context, pooled, label, tensor_fingerprint(context))
