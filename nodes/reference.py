"""The reference pass: a face through the model's own UNet, once, and what every layer saw (METHOD 1.2)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.adapter import FusionAdapter
from ..attention.cache import LayerFeatures, ReferenceFeatures
from ..attention.grid import LATENT_SCALE, grid_at_level
from ..attention.sites import Site


@dataclass(frozen=True, eq=False)
class ReferenceLatent:
    """One reference ready for the UNet: latent `[1, 4, h, w]` in the model's scale, whose it is, and its weight."""

    latent: Tensor
    identity: int
    weight: float
    fingerprint: str


@dataclass(frozen=True, eq=False)
class ReferenceText:
    """Text of the reference pass: context `[1, T, D_c]`, pooled `[1, P]` or None, and a name for reports."""

    context: Tensor
    pooled: Tensor | None
    label: str
    fingerprint: str


def latent_fingerprint(latent: Tensor) -> str:
    """sha256 of a latent's content."""
    return hashlib.sha256(latent.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def reference_features(
    base: Any,
    reference: ReferenceLatent,
    text: ReferenceText,
    adapter: FusionAdapter,
    sites: tuple[Site, ...],
    *,
    sigma: Tensor | None,
    options: dict[str, Any],
) -> ReferenceFeatures:
    """Runs the UNet of `base` (the host's BaseModel, loaded and patched) on one reference and projects its states.

    sigma: None for a clean reference at t=0, else the noise level `[1]` it is noised to (`matched`).
    """
    states = _hidden_states(base, reference, text, sigma, options)
    size = adapter.settings.reference_size // LATENT_SCALE
    layers = {}
    for site in sites:
        h = states[site.key]
        weights = adapter.projections[site.path]
        rows, columns = grid_at_level((size, size), site.level)
        layers[site.path] = LayerFeatures(h @ weights.key.to(h).T, h @ weights.value.to(h).T, rows * columns)
    return ReferenceFeatures(layers)


def _hidden_states(
    base: Any, reference: ReferenceLatent, text: ReferenceText, sigma: Tensor | None, options: dict[str, Any]
) -> dict[tuple[Any, ...], Tensor]:
    states: dict[tuple[Any, ...], Tensor] = {}

    def capture(n: Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple[Tensor, Any, Any]:
        states[(*extra["block"], extra["block_index"])] = n
        return n, context, value

    dtype = base.manual_cast_dtype if base.manual_cast_dtype is not None else base.get_dtype()
    device = options["device"]
    x, t = _noised(base, reference, sigma, device)
    clean = {"patches": {"attn2_patch": [capture]}, **options["kept"]}
    extra = {} if base.adm_channels == 0 else {"y": _adm(base, reference, text, device).to(dtype)}
    base.diffusion_model(
        _with_concat(base, x).to(dtype), t, context=text.context.to(device, dtype), control=None,
        transformer_options=clean, **extra,
    )  # fmt: skip
    return states


def _noised(base: Any, reference: ReferenceLatent, sigma: Tensor | None, device: Any) -> tuple[Tensor, Tensor]:
    latent = reference.latent.to(device, torch.float32)
    if sigma is None:
        return latent, torch.zeros(1, device=device)
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


def _adm(base: Any, reference: ReferenceLatent, text: ReferenceText, device: Any) -> Tensor:
    height, width = (n * LATENT_SCALE for n in reference.latent.shape[-2:])
    pooled = torch.zeros(1, 1280) if text.pooled is None else text.pooled.float()
    sizes = {"height": height, "width": width, "target_height": height, "target_width": width}
    return base.encode_adm(pooled_output=pooled.to(device), crop_h=0, crop_w=0, device=device, **sizes).to(device)
