"""MultiIDMaskRouter: who is where (METHOD 1.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io
from PIL import Image, ImageDraw
from torch import Tensor

from ..attention.routing import BACKGROUNDS, OVERLAPS, resolve_overlaps
from ..faces.align import align_face
from ..faces.assign import assign_by_order, assign_by_similarity
from ..faces.cache import embed_cached, find_faces_cached
from ..faces.identity import mixed_embedding
from ..faces.people import head_labels, label_masks
from .advanced import advanced
from .images import image_to_pictures, pictures_to_image
from .wire_types import Encoder, Identity, Routed, RoutedIdentities

NODE = "MultiIDMaskRouter"
ASSIGNMENTS = ["left to right", "right to left", "top to bottom", "largest first", "most similar"]
COLOURS = [(230, 85, 60), (60, 140, 230), (70, 190, 90), (225, 180, 50), (160, 90, 210), (60, 190, 190)]


class MultiIDMaskRouter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiIDMaskRouter",
            display_name="FusedID Multi-ID Mask Router",
            category="FusedID",
            description="Gives every person a region of the picture. Chain one node per person through 'routed'.",
            inputs=[
                Identity.Input("identity", tooltip="The person this node adds."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where this person is. Leave all masks open and connect 'content' to find the places "
                        "automatically."
                    ),
                ),
                Routed.Input(
                    "routed", optional=True, tooltip="The people added before, from another MultiIDMaskRouter."
                ),
                io.Image.Input(
                    "content",
                    optional=True,
                    tooltip=(
                        "A picture with as many people as identities: their heads become the masks. Connect on the "
                        "last node of the chain."
                    ),
                ),
                Encoder.Input("encoder", optional=True, tooltip="Finds the faces in 'content'."),
                io.Combo.Input(
                    "assign",
                    options=ASSIGNMENTS,
                    default=ASSIGNMENTS[0],
                    optional=True,
                    tooltip="Which found face belongs to which identity.",
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    tooltip="Soft border in pixels; 0 keeps people strictly apart.",
                ),
                io.Combo.Input(
                    "background",
                    options=list(BACKGROUNDS),
                    default="all",
                    optional=True,
                    tooltip="Pixels in no mask see all faces (paper) or none (text only).",
                ),
                advanced(
                    io.Combo.Input(
                        "overlap",
                        options=list(OVERLAPS),
                        default=OVERLAPS[0],
                        optional=True,
                        tooltip="Who gets pixels that two masks claim.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "separation",
                        default=0.0,
                        min=0.0,
                        max=20.0,
                        step=0.5,
                        optional=True,
                        tooltip="Holds people apart in coarse self-attention too; 0 is off.",
                    )
                ),
            ],
            outputs=[
                Routed.Output(display_name="routed"),
                io.Image.Output(display_name="preview"),
                io.Mask.Output(display_name="masks"),
            ],
        )

    @classmethod
    def execute(cls, identity: Any, **given: Any) -> io.NodeOutput:
        try:
            routed, background = route_people(identity, **given)
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
        return io.NodeOutput(routed, _preview(routed.masks, background), routed.masks)


def route_people(
    identity: Any, *, mask: Tensor | None = None, routed: RoutedIdentities | None = None, content: Tensor | None = None,
    encoder: Any = None, assign: str = ASSIGNMENTS[0], feather: int = 0, background: str = "all",
    overlap: str = OVERLAPS[0], separation: float = 0.0,
) -> tuple[RoutedIdentities, np.ndarray | None]:  # fmt: skip
    """The people so far plus this one, with resolved masks. Raises ValueError for masks that cannot be used."""
    people = (*(routed.identities if routed else ()), identity)
    picture = None
    if content is not None:
        picture = image_to_pictures(content)[0]
        masks = automatic_masks(picture, people, encoder, assign)
    elif mask is not None:
        masks = _joined(routed, mask[:1].float())
    elif routed is None:
        masks = torch.zeros(1, 8, 8)  # a place holder: the last node of the chain finds the places
    else:
        masks = torch.zeros(len(people), *routed.masks.shape[-2:])
    pending = float(masks.amax()) == 0.0
    if not pending:
        masks = resolve_overlaps(_feathered(masks, feather), overlap)  # type: ignore[arg-type]
    return RoutedIdentities(people, masks, background, feather > 0, separation), picture


def automatic_masks(picture: np.ndarray, people: tuple[Any, ...], encoder: Any, assign: str) -> Tensor:
    """Head masks `[I, H, W]` of the faces found in a picture, in the identities' order."""
    if encoder is None:
        raise ValueError("'content' needs 'encoder' to find its faces; connect LoadIdentityEncoder")
    faces = find_faces_cached(picture, encoder).faces
    if len(faces) < len(people):
        raise ValueError(
            f"{len(faces)} faces found in 'content' for {len(people)} identities. Use another picture, or paint masks"
        )
    if assign == "most similar":
        aligned = np.stack([align_face(picture, face.keypoints) for face in faces])
        chosen, _ = assign_by_similarity(
            np.stack([embed_cached(one, encoder) for one in aligned]), np.stack([mixed_embedding(p) for p in people])
        )
    else:
        chosen = assign_by_order(faces, len(people), assign)
    kept = [faces[i] for i in chosen]
    labels = head_labels(kept, picture.shape[0], picture.shape[1])
    return torch.from_numpy(np.asarray(label_masks(labels, len(kept)), dtype=np.float32))


def _joined(routed: RoutedIdentities | None, mask: Tensor) -> Tensor:
    if routed is None:
        return mask
    if mask.shape[-2:] != routed.masks.shape[-2:]:
        raise ValueError(
            f"this mask is {list(mask.shape[-2:])}, the masks before are {list(routed.masks.shape[-2:])}; "
            "use masks of one size (the picture's)"
        )
    return torch.cat([routed.masks.to(mask), mask])


def _feathered(masks: Tensor, feather: int) -> Tensor:
    if feather == 0:
        return (masks >= 0.5).float() if float(masks.amax()) >= 0.5 else masks
    size = 2 * feather + 1
    return torch.nn.functional.avg_pool2d(masks[None], size, 1, feather, count_include_pad=False)[0]


def _preview(masks: Tensor, picture: np.ndarray | None) -> Tensor:
    """Numbered, coloured regions over the content picture (or black)."""
    h, w = masks.shape[-2:]
    base = np.zeros((h, w, 3), np.float32) if picture is None else picture.astype(np.float32)
    for i, mask in enumerate(masks.cpu().numpy()):
        base += mask[..., None] * 0.5 * (np.array(COLOURS[i % len(COLOURS)], np.float32) - base)
    image = Image.fromarray(base.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for i, mask in enumerate(masks.cpu().numpy()):
        rows, columns = np.nonzero(mask > 0.5)
        if len(rows):
            draw.text(
                (columns.mean(), rows.mean()), str(i + 1), fill=(255, 255, 255), font_size=max(12, h // 16), anchor="mm"
            )
    return pictures_to_image([np.asarray(image)])
