"""FusedIDPlaceInPicture: prompts that tell where the sampled part lies in the picture."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

from .host.told_place import tell_by_cutting, tell_view
from .images import require_image
from .picture_parts import Part, PartPlace

NODE = "FusedIDPlaceInPicture"


class PlaceInPicture(io.ComfyNode):
    """Translator from sockets to `place_prompts`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDPlaceInPicture",
            display_name="FusedID Place in Picture",
            category="FusedID",
            description=(
                "For nodes that sample a picture in parts: tiles, or crops around faces. Without it a part looks like "
                "a whole picture, everybody's region is laid over it, and people get each other's face. With it every "
                "part shows the people who are there. Changes nothing else."
            ),
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt; behind all ControlNets."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; behind all ControlNets."),
                io.Image.Input(
                    "image", optional=True,
                    tooltip="The whole picture that another node is going to cut, such as Ultimate SD Upscale or a "
                    "detailer. At the size at which it is cut; the proportions must be right.",
                ),
                PartPlace.Input(
                    "place", optional=True, tooltip="Instead of 'image': where a part of FusedIDCutPicture lies."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the node that samples the parts."),
                io.Conditioning.Output(display_name="negative", tooltip="For the node that samples the parts."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, positive: Any, negative: Any, image: Any = None, place: Any = None) -> io.NodeOutput:
        try:
            return io.NodeOutput(*place_prompts(positive, negative, image=image, place=place))
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error


def place_prompts(positive: Any, negative: Any, *, image: Tensor | None, place: Part | None) -> tuple[Any, Any]:
    """Both prompts, told. Raises ValueError unless exactly one of image and place is given."""
    if (image is None) == (place is None):
        got = "none" if image is None else "both"
        raise ValueError(
            f"got {got} of 'image' and 'place'. Connect one: 'image', the whole picture that another node cuts, or "
            "'place' of FusedIDCutPicture"
        )
    if place is not None:
        return tell_view(positive, place.view), tell_view(negative, place.view)
    assert image is not None
    require_image(image)
    return tell_by_cutting(positive, negative, (image.shape[1], image.shape[2]))
