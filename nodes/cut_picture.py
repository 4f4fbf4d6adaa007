"""FusedIDCutPicture: a picture in parts, around its people or in tiles."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

from .images import require_image
from .input_ranges import require_in_range
from .picture_parts import Part, PartPlace, cut_out, people_parts, tile_parts
from .wire_types import Routed, RoutedIdentities, require_places

NODE = "FusedIDCutPicture"
PEOPLE, TILES = "people", "tiles"


class CutPicture(io.ComfyNode):
    """Translator from sockets to `cut_picture`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDCutPicture",
            display_name="FusedID Cut Picture",
            category="FusedID",
            description=(
                "Cuts a picture into parts that are refined one by one and put back by FusedIDPasteParts: a part "
                "around everybody, enlarged, for better faces; or tiles, for pictures too large for one pass."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Combo.Input(
                    "parts", options=[PEOPLE, TILES], default=PEOPLE,
                    tooltip="One part around everybody's region, or tiles that cover the picture.",
                ),
                Routed.Input("routed", optional=True, tooltip="The people, for parts around them."),
                io.Int.Input(
                    "size", default=512, min=128, max=2048, step=64, optional=True,
                    tooltip="Pixels along the longer side of a part while it is refined: what the model was trained "
                    "with, 512 for SD1.5, 1024 for SDXL. Larger parts keep their size.",
                ),
                io.Float.Input(
                    "margin", default=0.25, min=0.0, max=2.0, step=0.05, optional=True,
                    tooltip="What is added around a person on every side, as a share of the region's longer side; for "
                    "tiles the share of a side that neighbours have in common, 0.5 at most.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="parts", is_output_list=True, tooltip="Every part by itself, as a list."),
                PartPlace.Output(
                    display_name="places", is_output_list=True, tooltip="Where each of them lies in the picture."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Any, parts: str, **given: Any) -> io.NodeOutput:
        try:
            require_in_range(cls, {"parts": parts, **given})
            places = cut_places(image, parts, **given)
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
        return io.NodeOutput([cut_out(image, place) for place in places], places)


def cut_places(
    image: Tensor, parts: str, *, routed: RoutedIdentities | None = None, size: int = 512, margin: float = 0.25
) -> list[Part]:
    """The parts of an IMAGE `[B, H, W, C]`. Raises ValueError for people without places and margins too wide."""
    require_image(image)
    picture_hw = (image.shape[1], image.shape[2])
    if parts == TILES:
        if margin > 0.5:
            raise ValueError(f"margin is {margin:g}; neighbouring tiles can share 0.5 of their side at most")
        return tile_parts(picture_hw, size=size, margin=margin)
    if routed is None:
        raise ValueError("'routed' is not connected, and parts around people need it; or set parts to 'tiles'")
    require_places(routed)
    assert routed.masks is not None
    return people_parts(routed.masks, picture_hw, size=size, margin=margin)
