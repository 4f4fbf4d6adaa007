"""MultiIDMaskRouter: who is where (METHOD 1.4). One node per person, chained; the last one's settings count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..attention.routing import BACKGROUNDS, OVERLAPS
from ..faces.identity import Identity as Person
from ..faces.preview import draw_faces
from .advanced import advanced
from .images import image_to_pictures, pictures_to_image
from .input_ranges import require_in_range
from .people_masks import HEAD, ORDER_OF_CHOICE, REGIONS, FoundPeople, find_people
from .region_masks import at_one_size, given_mask, resolved_masks, same_shape
from .routing_preview import draw_routing
from .wire_types import Encoder, Identity, Place, Routed, RoutedIdentities, require_places

NODE = "MultiIDMaskRouter"
ASSIGNMENTS = list(ORDER_OF_CHOICE)
LAST = "The last node of the chain decides for everybody."


class MultiIDMaskRouter(io.ComfyNode):
    """Translator from sockets to `route_people`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiIDMaskRouter",
            display_name="FusedID Multi-ID Mask Router",
            category="FusedID",
            description=(
                "Gives every person a region of the picture. Chain one node per person through 'routed'. Regions come "
                "from masks, or from a content picture whose people are found; all other settings are taken from the "
                "last node of the chain."
            ),
            inputs=_inputs(),
            outputs=[
                Routed.Output(display_name="routed"),
                io.Image.Output(display_name="preview", tooltip="Regions in colours with the people's numbers."),
                io.Mask.Output(display_name="masks", tooltip="One mask per person, in the order of the chain."),
            ],
        )

    @classmethod
    def execute(cls, identity: Any, **given: Any) -> io.NodeOutput:
        try:
            require_in_range(cls, given)
            routed, preview = route_people(identity, **given)
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
        return io.NodeOutput(routed, preview, _masks_output(routed))


def _inputs() -> list[Any]:
    return [
        Identity.Input("identity", tooltip="The person this node adds."),
        io.Mask.Input(
            "mask", optional=True,
            tooltip="Where this person is, painted white; any size with the picture's proportions. Leave it open to "
            "have the place found in 'content'.",
        ),
        Routed.Input("routed", optional=True, tooltip="The people added before, from another MultiIDMaskRouter."),
        io.Image.Input(
            "content", optional=True,
            tooltip="A picture with at least as many people as identities, with the proportions of the picture to be "
            "made: everybody without a painted mask gets one of its people. Connect it to the last node of the chain.",
        ),
        Encoder.Input("encoder", optional=True, tooltip="Finds the faces in 'content'."),
        io.Combo.Input(
            "assign", options=ASSIGNMENTS, default=ASSIGNMENTS[0], optional=True,
            tooltip="Which found person belongs to which identity: by the place of the faces' centres, by size, or by "
            "likeness (the best pairing of all). With more people than identities the largest faces are used (most "
            "similar: the likeliest) and the others, framed in the preview, stay background.",
        ),
        io.Int.Input(
            "feather", default=0, min=0, max=256, optional=True,
            tooltip="Half width in pixels of soft borders between people. 0 keeps people strictly apart; grey parts of "
            f"a mask then count from one half on. {LAST}",
        ),
        io.Combo.Input(
            "background", options=list(BACKGROUNDS), default="all", optional=True,
            tooltip=f"Pixels in no mask see all faces (all, as in the paper) or none of them (none, text only). {LAST}",
        ),
        advanced(io.Combo.Input(
            "overlap", options=list(OVERLAPS), default=OVERLAPS[0], optional=True,
            tooltip="Who gets pixels that two masks claim: the larger mask value (between equals the smaller region), "
            f"or the first or last person of the chain. {LAST}",
        )),
        advanced(io.Float.Input(
            "separation", default=0.0, min=0.0, max=20.0, step=0.5, optional=True,
            tooltip=f"Holds people apart in coarse self-attention too; 0 is off. {LAST}",
        )),
        io.Combo.Input(
            "region", options=REGIONS, default=HEAD, optional=True,
            tooltip="What a found person's region is: the head (face with hair), or the whole body, which needs a "
            "person segmentation model (.onnx) in models/fusedid/segmentation.",
        ),
    ]  # fmt: skip


def route_people(
    identity: Person, *, mask: Tensor | None = None, routed: RoutedIdentities | None = None,
    content: Tensor | None = None, encoder: Any = None, assign: str = ASSIGNMENTS[0], feather: int = 0,
    background: str = "all", overlap: str = OVERLAPS[0], separation: float = 0.0, region: str = HEAD,
) -> tuple[RoutedIdentities, Tensor]:  # fmt: skip
    """The people so far plus this one, and the preview IMAGE `[1, H, W, 3]`.

    Regions are resolved from the masks as they were given, with this node's settings; what earlier nodes resolved for
    their own preview is not used. Raises ValueError for masks or a content picture that cannot be used.
    """
    people = (*(routed.identities if routed else ()), identity)
    new = Place() if mask is None else Place(given_mask(mask), painted=True)
    places = (*(routed.places if routed else ()), new)
    picture = None
    found = FoundPeople(places)
    if content is not None:
        picture = _one_picture(content)
        found = find_people(picture, people, places, encoder, assign=assign, region=region)
        picture = draw_faces(picture, found.bystanders, {}, None)
    masks = _resolved(found.places, overlap, feather)
    result = RoutedIdentities(people, masks, background, feather > 0, separation, found.places)
    return result, _preview(result, picture)


def _resolved(places: Sequence[Place], overlap: Any, feather: int) -> Tensor | None:
    """Regions `[I, H, W]`, or None while somebody has no place."""
    known = [place.mask for place in places if place.mask is not None]
    if not known:
        return None
    masks = at_one_size(known)
    return resolved_masks(masks, overlap=overlap, feather=feather) if len(known) == len(places) else None


def _one_picture(content: Tensor) -> np.ndarray:
    pictures = image_to_pictures(content)
    if len(pictures) > 1:
        raise ValueError(f"'content' holds {len(pictures)} pictures; connect one")
    return pictures[0]


def _preview(routed: RoutedIdentities, picture: np.ndarray | None) -> Tensor:
    masks = [place.mask for place in routed.places] if routed.masks is None else list(routed.masks)
    for mask in masks:
        if mask is not None and picture is not None and not same_shape(tuple(mask.shape), picture.shape[:2]):
            raise ValueError(
                f"'content' is {picture.shape[1]} x {picture.shape[0]}, a mask {mask.shape[1]} x {mask.shape[0]}: "
                "these shapes cannot show the same picture. Give both the same proportions"
            )
    names = [person.name for person in routed.identities]
    drawn = draw_routing([None if mask is None else mask.numpy() for mask in masks], names, picture)
    return pictures_to_image([drawn])


def _masks_output(routed: RoutedIdentities) -> Any:
    """The MASK batch; before everybody has a place a block that tells whoever uses the output so."""
    try:
        require_places(routed)
    except ValueError as error:
        return ExecutionBlocker(f"{NODE}: {error}")
    return routed.masks
