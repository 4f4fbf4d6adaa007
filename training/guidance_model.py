"""The shared Linear and the UNet it steers, as one trained module (METHOD 2.5). LoRA through peft."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attention.guidance import Guidance
from attention.guidance_settings import GuidanceSettings

from .config import LoraConfig
from .unet_sites import UNet

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class GuidanceModel(nn.Module):
    """e_g = Linear(style || face) takes the place of the text context."""

    def __init__(self, unet: UNet, settings: GuidanceSettings, *, lora: LoraConfig | None) -> None:
        super().__init__()
        self.guidance = Guidance(settings)
        self.unet = unet
        self.lora = lora
        unet.requires_grad_(lora is None)
        if lora is not None:
            _add_lora(unet, lora)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, style: Tensor, face: Tensor, added: dict[str, Tensor] | None
    ) -> Tensor:
        """Prediction `[B, 4, h, w]` from prepared embeddings: style `[B, S]`, face `[B, D]`."""
        context = self.guidance(style, face)
        return self.unet(noisy, timesteps, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The Linear, and the UNet or its LoRA."""
        return [(name, weight) for name, weight in self.named_parameters() if weight.requires_grad]


def _add_lora(unet: UNet, lora: LoraConfig) -> None:
    try:
        from peft import LoraConfig as PeftConfig
    except ImportError as error:
        raise ValueError("guidance.train=lora needs peft: pip install peft") from error
    unet.add_adapter(
        PeftConfig(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
    )


def lora_tensors(weights: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """peft's names -> `lora_unet_<path>.lora_down/lora_up.weight` and `.alpha`, which ComfyUI and others load."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for marker, part in ((".lora_A.default.weight", "lora_down"), (".lora_B.default.weight", "lora_up")):
            if name.endswith(marker):
                module = name.removeprefix("unet.").removesuffix(marker).replace(".", "_")
                found[f"lora_unet_{module}.{part}.weight"] = weight
                found[f"lora_unet_{module}.alpha"] = torch.tensor(float(lora.alpha))
    return found
