"""FusedIDPasteParts: the parts of FusedIDCutPicture back in the picture."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from .picture_parts import PartPlace, put_back

NODE = "FusedIDPasteParts"


class PasteParts(io.ComfyNode):
    """Translator from sockets to `put_back`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDPasteParts",
            display_name="FusedID Paste Parts",
            category="FusedID",
            description=(
                "Puts refined parts back where FusedIDCutPicture cut them out. Their margins fade into the picture, "
                "and neighbouring tiles into each other."
            ),
            is_input_list=True,
            inputs=[
                io.Image.Input("image", tooltip="The picture that was cut, of the same size."),
                io.Image.Input("parts", tooltip="The refined parts, in the order in which they were cut."),
                PartPlace.Input("places", tooltip="Where they lie, from FusedIDCutPicture."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture with its parts refined.")],
        )

    @classmethod
    def execute(cls, image: Any, parts: Any, places: Any) -> io.NodeOutput:
        try:
            if len(image) != 1 or len(parts) != len(places):
                raise ValueError(
                    f"got {len(image)} pictures, {len(parts)} parts and {len(places)} places; wanted are one picture "
                    "and a place for every part. Connect 'places' of the FusedIDCutPicture that cut the parts"
                )
            return io.NodeOutput(put_back(image[0], list(zip(places, parts))))
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
