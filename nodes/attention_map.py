"""FusedIDAttentionMap: which pixels of the finished picture looked at whom."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from .attention_overlay import Person, draw_shares, share_lines
from .attention_recording import AttentionRecording
from .images import image_to_pictures, pictures_to_image
from .input_ranges import require_in_range
from .wire_types import Recording

NODE = "FusedIDAttentionMap"
STRETCH = 1.1
"""Pictures whose proportions differ from the recorded ones by more show something else."""


class AttentionMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Attention Map",
            category="FusedID",
            description="Shows over the finished picture which pixels looked at whom while it was sampled, each person "
            "in a colour. Fused and training-free: share of the attention on the person's keys, the rest is the "
            "text's or the picture's own. Decoupled (most community files): share of the layers' output.",
            inputs=[
                Recording.Input("recording", tooltip="From Record Attention, whose model the sampler used."),
                io.Image.Input("image", tooltip="The decoded pictures of that sampler, all of the batch. Sizes may "
                               "differ, proportions may not."),
                io.Int.Input("identity", default=0, min=0, max=64, tooltip="Number of the person; 0 shows everybody, "
                             "each in a colour."),
                io.Float.Input("opacity", default=0.7, min=0.0, max=1.0, step=0.05, tooltip="How strongly the colours "
                               "cover the picture."),
            ],
            outputs=[
                io.Image.Output(display_name="overlay", tooltip="The pictures in colours, with a legend."),
                io.Mask.Output(display_name="shares", tooltip="0 to 1: what part of a pixel's attention the chosen "
                               "person got, or all people together. Not stretched."),
                io.String.Output(display_name="report"),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, recording: AttentionRecording, image: Tensor, identity: int, opacity: float) -> io.NodeOutput:
        try:
            require_in_range(cls, {"identity": identity, "opacity": opacity})
            overlay, shares, report = attention_map(recording, image, identity, opacity)
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
        return io.NodeOutput(overlay, shares, report, ui=ui.PreviewImage(overlay, cls=cls))


def attention_map(
    recording: AttentionRecording, image: Tensor, identity: int, opacity: float
) -> tuple[Tensor, Tensor, str]:
    """Overlay IMAGE, MASK `[B, H, W]` of the shown people's shares together, and the report."""
    pictures = image_to_pictures(image)
    shown = _shown(recording.people(), identity)
    size = pictures[0].shape[:2]
    maps = [(number, name, _fitted(share, len(pictures), size)) for number, name, share in shown]
    drawn, lines = [], []
    for index, picture in enumerate(pictures):
        people: list[Person] = [(number, name, share[index].numpy()) for number, name, share in maps]
        drawn.append(draw_shares(picture, people, opacity))
        lines += [f"picture {index + 1}: {line}" for line in share_lines(people)]
    total = torch.stack([share for _, _, share in maps]).sum(0).clamp(0.0, 1.0)
    return pictures_to_image(drawn), total, "\n".join(lines)


def _shown(people: list[tuple[str, Tensor]], identity: int) -> list[tuple[int, str, Tensor]]:
    numbered = [(number, name, share) for number, (name, share) in enumerate(people)]
    if identity > len(numbered):
        raise ValueError(
            f"identity is {identity}, recorded were {len(numbered)}. Choose one of them, or 0 for everybody"
        )
    return numbered if identity == 0 else [numbered[identity - 1]]


def _fitted(share: Tensor, num_pictures: int, size: tuple[int, ...]) -> Tensor:
    """`[B, h, w]` at the pictures' size. Raises ValueError when these cannot be the pictures of the recording."""
    if share.shape[0] != num_pictures:
        raise ValueError(
            f"got {num_pictures} pictures, recorded were {share.shape[0]}. Connect the decoded pictures of the sampler "
            "that used the recorded model; with several samplers, the last one counts"
        )
    stretch = (size[1] / size[0]) / (share.shape[2] / share.shape[1])
    if max(stretch, 1 / stretch) > STRETCH:
        raise ValueError(
            f"the picture is {size[1]} x {size[0]}, the recorded latent {share.shape[2]} x {share.shape[1]}: these "
            "proportions do not show the same picture. Connect the sampler's whole decoded picture"
        )
    return F.interpolate(share[None], size=size, mode="bilinear", align_corners=False)[0]
