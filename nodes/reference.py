"""The reference pass: a face through the model's own UNet, and what every layer saw (METHOD 1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.cache import ReferenceFeatures
from ..attention.grid import LATENT_SCALE
from ..attention.merge import merged
from ..attention.sites import Site
from ..attention.storage import AS_COMPUTED, Storage, StoredFeatures, stored
from .face_sources import FaceSource, Seen
from .host.clean_room import call_options, clean_room, note_cross_attention, note_self_attention
from .host.effect import Key
from .host.model_call import POOLED_WIDTH


@dataclass(frozen=True, eq=False)
class ReferenceLatent:
    """One reference ready for the UNet: latent `[1, 4, h, w]` in the model's scale, and a name for its content."""

    latent: Tensor
    fingerprint: str


@dataclass(frozen=True, eq=False)
class ReferenceText:
    """Text of the reference pass: context `[1, T, D_c]`, pooled `[1, P]` or None, and a name for its content."""

    context: Tensor
    pooled: Tensor | None
    label: str
    fingerprint: str


@torch.no_grad()
def reference_features(
    base: Any,
    reference: ReferenceLatent,
    text: ReferenceText,
    source: FaceSource,
    sites: tuple[Site, ...],
    *,
    sigma: Tensor | None,
    device: torch.device,
    options: Mapping[str, Any],
    share: float = 1.0,
    storage: Storage = AS_COMPUTED,
) -> ReferenceFeatures | StoredFeatures:
    """Runs the UNet of `base` (the host's BaseModel, loaded and patched) on one reference and projects its states.

    sigma: None for a clean reference at t=0, else the noise level `[1]` it is noised to (`matched`). options: of the
    picture's own pass; of other packs only an attention kernel acts in this one. share: of the tokens, left by merging.
    storage: the form of the result.
    """
    seen: dict[Key, Seen] = {}
    x, t = _noised(base, reference, sigma, device)
    level = torch.zeros(1, device=device) if sigma is None else sigma.reshape(1)
    with clean_room(base, options) as unet:
        _pass(base, unet, x, t, reference, text, call_options(options, level, **_notes(source, sites, seen)))
        layers = ((s.path, source.features(s, unet.get_submodule(s.path), seen.pop(s.key))) for s in sites)
        fewer = ((path, merged(layer, share)) for path, layer in layers)
        if storage == AS_COMPUTED:
            return ReferenceFeatures(dict(fewer))
        return StoredFeatures({path: stored(layer, storage) for path, layer in fewer})  # one at a time: small peak


def _pass(
    base: Any, unet: nn.Module, x: Tensor, t: Tensor, reference: ReferenceLatent, text: ReferenceText,
    options: dict[str, Any],
) -> None:  # fmt: skip
    dtype = base.manual_cast_dtype if base.manual_cast_dtype is not None else base.get_dtype()
    adm = {} if base.adm_channels == 0 else {"y": _adm(base, reference, text, x.device).to(dtype)}
    context = text.context.to(x.device, dtype)
    unet(_with_concat(base, x).to(dtype), t, context=context, control=None, transformer_options=options, **adm)


def _notes(source: FaceSource, sites: tuple[Site, ...], seen: dict[Key, Seen]) -> dict[str, Any]:
    """Patches that note what the source wants to see of every layer."""
    if source.attention == "attn2":
        return note_cross_attention(lambda key, normed: seen.update({key: Seen(normed=normed)}))
    return note_self_attention(
        [site.key for site in sites], lambda key, q, k, v: seen.update({key: Seen(query=q, key=k, value=v)})
    )


def _noised(base: Any, reference: ReferenceLatent, sigma: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    latent = reference.latent.to(device, torch.float32)
    if sigma is None:
        return latent, torch.zeros(1, device=device)
    # From the content, so that the same face is noised alike in every step, run and process.
    generator = torch.Generator().manual_seed(int(reference.fingerprint[:15], 16))
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    sigma = sigma.to(latent).reshape(1)
    noised = base.model_sampling.noise_scaling(sigma.reshape(1, 1, 1, 1), noise, latent)
    return base.model_sampling.calculate_input(sigma, noised), base.model_sampling.timestep(sigma).float()


def _with_concat(base: Any, x: Tensor) -> Tensor:
    """Inpainting UNets also read a mask (0: nothing to paint) and the masked picture (all of it)."""
    channels = base.model_config.unet_config["in_channels"]
    if channels == 9:
        return torch.cat([x, torch.zeros_like(x[:, :1]), x], 1)
    return torch.cat([x, x], 1) if channels == 8 else x


def _adm(base: Any, reference: ReferenceLatent, text: ReferenceText, device: torch.device) -> Tensor:
    height, width = (n * LATENT_SCALE for n in reference.latent.shape[-2:])
    pooled = torch.zeros(1, POOLED_WIDTH) if text.pooled is None else text.pooled.float()
    sizes = {"height": height, "width": width, "target_height": height, "target_width": width}
    return base.encode_adm(pooled_output=pooled.to(device), crop_h=0, crop_w=0, device=device, **sizes).to(device)
