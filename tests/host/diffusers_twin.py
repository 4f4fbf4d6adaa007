"""One small model twice: loaded by the host, and with the same weights in diffusers under the fused attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention.adapter import AdapterSettings
from training.unet import FusedUNet, TextContext


@dataclass(frozen=True, eq=False)
class UNetCall:
    """One pass through the host's UNet: what went in and what came out. negative: bool per row."""

    x: Tensor
    t: Tensor
    context: Tensor
    y: Tensor | None
    negative: Tensor
    out: Tensor


@dataclass(frozen=True, eq=False)
class HostBase:
    """What training's drawing code asks of a base model, answered by the host's VAE, latent scale and conditioning."""

    patcher: Any
    vae: Any
    positive: Any

    def prompts(self, _: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The positive conditioning, whatever the prompt: tokens `[1, T, D_c]` and pooled `[1, P]`."""
        tokens, extra = self.positive[0]
        return tokens, extra["pooled_output"]

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> scaled latents."""
        assert noise is None
        latent = self.vae.host.encode((pixels.permute(0, 2, 3, 1) + 1) / 2)
        return self.patcher.model.process_latent_in(latent.float())


@dataclass(frozen=True)
class VaeOnCpu:
    """A host VAE that says where it is."""

    host: Any
    device: str = "cpu"


def diffusers_unet(patcher: Any) -> torch.nn.Module:
    """A UNet2DConditionModel with a MODEL's weights, fp32."""
    from diffusers import UNet2DConditionModel

    config = patcher.model.model_config.unet_config
    unet = UNet2DConditionModel(**diffusers_config(config)).eval()
    unet.load_state_dict(diffusers_weights(patcher, config), strict=True)
    return unet


def fused_twin(patcher: Any, *, reference_size: int = 64) -> FusedUNet:
    """The same in training's wrapper."""
    return FusedUNet(diffusers_unet(patcher), AdapterSettings(base="custom", reference_size=reference_size)).eval()


def diffusers_config(config: dict) -> dict:
    """diffusers' description of the UNet that the host detected."""
    channels = [config["model_channels"] * m for m in config["channel_mult"]]
    layers = config["num_res_blocks"][0]
    depth = config["transformer_depth"][::layers]
    crosses = [bool(d) for d in depth]
    sdxl = config.get("adm_in_channels") is not None
    heads = [c // config["num_head_channels"] if config["num_heads"] == -1 else config["num_heads"] for c in channels]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.get("adm_in_channels"),
        "use_linear_projection": True,
    }
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crosses],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crosses)],
        "transformer_layers_per_block": [max(1, d) for d in depth],
        "attention_head_dim": heads,
        "cross_attention_dim": config["context_dim"],
        **(added if sdxl else {}),
    }


def diffusers_weights(patcher: Any, config: dict) -> dict[str, Tensor]:
    """The host's weights under diffusers' names, by the host's own map."""
    from comfy.utils import unet_to_diffusers

    weights = patcher.model.diffusion_model.state_dict()
    names = unet_to_diffusers(config).items()
    # The host calls SDXL's label embedding by two diffusers names; diffusers' SDXL has the second only.
    return {new: weights[old].float() for new, old in names if old in weights and not new.startswith("class_embedding")}


def watched_call(lab: Any, model: Any, **how: Any) -> UNetCall:
    """The pass through the UNet in one denoising step of a MODEL. Reference passes come before it."""
    seen: list[UNetCall] = []

    def note(_: Any, arguments: Sequence[Any], named: dict[str, Any], out: Tensor) -> None:
        each = named["transformer_options"].get("cond_or_uncond", [])
        x, t = arguments[:2]
        rows = torch.tensor(each, dtype=torch.bool).repeat_interleave(len(x) // max(1, len(each)))
        seen.append(UNetCall(x.clone(), t.clone(), named["context"].clone(), named.get("y"), rows, out.clone()))

    handle = lab.unet.register_forward_hook(note, with_kwargs=True)
    try:
        lab.call(model, **how)
    finally:
        handle.remove()
    return seen[-1]


def context_of(fused: FusedUNet, call: UNetCall, conditionings: Sequence[Any]) -> TextContext:
    """The text of a host call as diffusers wants it. conditionings: (positive, negative), whose pooled text is taken.

    The host gives SDXL one vector `y`; that diffusers would make the same from pooled text and sizes is checked.
    """
    if call.y is None:
        return TextContext(call.context)
    height, width = (8 * side for side in call.x.shape[2:])
    pooled = torch.cat([conditionings[int(row)][0][1]["pooled_output"] for row in call.negative])
    ids = torch.tensor([[height, width, 0, 0, height, width]]).float().expand(len(call.x), -1)
    embedded = fused.unet.add_time_proj(ids.flatten()).reshape(len(ids), -1)
    assert torch.allclose(torch.cat([pooled, embedded], 1), call.y.float(), atol=1e-4)
    return TextContext(call.context, pooled, ids)
