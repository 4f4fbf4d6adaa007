"""Nodes for a server under test: they save what a socket carries, so that a test can read it behind HTTP.

`live_server.start_server` serves this file when it lies in the base's custom_nodes; it is no part of the pack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch


def _save(name: str, **tensors: Any) -> dict[str, Any]:
    import folder_paths
    from safetensors.torch import save_file

    path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
    save_file({key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}, path)
    return {}


def _first_attention(model: Any, conditioning: Any) -> torch.Tensor:
    import comfy.sample

    seen: list[torch.Tensor] = []
    clone = model.clone()
    clone.set_model_attn2_output_patch(lambda n, options: seen.append(n.clone()) or n)
    latent = torch.zeros(1, 4, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    comfy.sample.sample(
        clone, noise, 1, 1.0, "euler", "normal", conditioning, conditioning, latent, disable_pbar=True, seed=7
    )
    return seen[0]


class Probe:
    """Saves one socket's content as `output/<name>.safetensors`."""

    RETURN_TYPES, OUTPUT_NODE, FUNCTION, CATEGORY = (), True, "save", "test"
    SOCKETS: ClassVar[dict[str, str]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sockets = {name: (kind, {}) for name, kind in cls.SOCKETS.items()}
        return {"required": {**sockets, "name": ("STRING", {"default": "probe"})}}


class ProbeConditioning(Probe):
    """The context `[1, N, C]` and the pooled text of the first entry."""

    SOCKETS: ClassVar[dict[str, str]] = {"conditioning": "CONDITIONING"}

    def save(self, conditioning: Any, name: str) -> dict[str, Any]:
        context, extra = conditioning[0]
        return _save(name, value=context, pooled=extra["pooled_output"])


class ProbeIdentity(Probe):
    """The raw embedding `[D]` of an identity's first photo."""

    SOCKETS: ClassVar[dict[str, str]] = {"identity": "FUSEDID_IDENTITY"}

    def save(self, identity: Any, name: str) -> dict[str, Any]:
        return _save(name, value=torch.from_numpy(identity.references[0].embedding))


class ProbeLatent(Probe):
    """Latent `[B, 4, h, w]`."""

    SOCKETS: ClassVar[dict[str, str]] = {"latent": "LATENT"}

    def save(self, latent: Any, name: str) -> dict[str, Any]:
        return _save(name, value=latent["samples"])


class ProbeAttention(Probe):
    """What the first cross-attention layer gives `[1, Q, C]` at the first step: nothing has spread before it."""

    SOCKETS: ClassVar[dict[str, str]] = {"model": "MODEL", "conditioning": "CONDITIONING"}

    def save(self, model: Any, conditioning: Any, name: str) -> dict[str, Any]:
        return _save(name, value=_first_attention(model, conditioning))


NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in (ProbeConditioning, ProbeIdentity, ProbeLatent, ProbeAttention)}
