"""A whole UNet's weight names: diffusers -> LDM, the names of `.safetensors` checkpoints and of ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)$")
_PREFIX = re.compile(
    r"^((?:down|up)_blocks\.\d+\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+"
    r"|mid_block\.(?:resnets|attentions)\.\d+|\w+_embedding\.linear_\d|conv_\w+)\.(.+)$"
)


def unet_to_ldm(weights: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """All weights of a diffusers UNet under LDM names. Raises ValueError for a name no SD-type UNet has."""
    with_attention = {name.rsplit(".attentions.", 1)[0] for name in weights if ".attentions." in name}
    return {_ldm_name(name, layers_per_block, with_attention): weight for name, weight in weights.items()}


def _ldm_name(name: str, layers: int, with_attention: set[str]) -> str:
    match = _PREFIX.match(name)
    if match is None:
        raise ValueError(f"{name} is no weight of an SD-type UNet, so it has no name in a checkpoint")
    module, rest = match.groups()
    if ".resnets." in module:
        part, _, leaf = rest.partition(".")
        rest = f"{_IN_RESNET[part]}.{leaf}"
    return f"{_FIXED.get(module) or _ldm_block(module, layers, with_attention)}.{_inner(module, rest)}"


def _inner(module: str, rest: str) -> str:
    return rest.removeprefix("conv.") if ".downsamplers." in module else rest


def _ldm_block(module: str, layers: int, with_attention: set[str]) -> str:
    match = _BLOCK.match(module)
    assert match is not None, module
    direction, block, kind, index = match.group(1), int(match.group(2)), match.group(3), int(match.group(4))
    stride = layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * stride}.0.op"
    if kind == "upsamplers":
        place = 2 if f"up_blocks.{block}" in with_attention else 1
        return f"output_blocks.{block * stride + layers}.{place}"
    number = 1 + block * stride + index if direction == "down" else block * stride + index
    section = "input_blocks" if direction == "down" else "output_blocks"
    return f"{section}.{number}.{0 if kind == 'resnets' else 1}"
