"""FusedIDInstantIDControl: what InstantID's ControlNet needs: the face's tokens instead of the text, key points.

InstantID is two files: the adapter, which FusedIDAttentionPatch puts into the model, and a ControlNet whose
cross-attention reads the same face tokens. The host hands a ControlNet the text, or what a prompt holds under
`cross_attn_controlnet`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..attention.community.families import AS_RECOGNISED, INSTANTID
from ..faces.detect import find_faces
from ..faces.identity import Identity as Person
from ..faces.identity import Reference
from ..faces.keypoints_picture import draw_keypoints, placed
from ..faces.select import LARGEST, order_faces
from .community_files import FOLDERS, community_choices, community_fingerprint, load_community_choice, recognised_choice
from .community_source import identity_tokens
from .images import image_to_pictures, pictures_to_image
from .input_ranges import require_in_range
from .wire_types import Encoder, Identity, RoutedIdentities

FOR_CONTROLNET = "cross_attn_controlnet"
"""Where the host looks in a prompt for what its ControlNets read in place of the text."""
LARGEST_SIDE = 8192
Conditioning = list[list[Any]]


class FusedIDInstantIDControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDInstantIDControl",
            display_name="FusedID InstantID ControlNet",
            category="FusedID",
            description=(
                "Prepares prompts for InstantID's ControlNet: it reads the person's tokens in place of the text. "
                "Connect all three outputs and the ControlNet to Apply ControlNet; the patch takes the same "
                "adapter."
            ),
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="The prompt. The model still reads it; ControlNets read the face instead."
                ),
                io.Conditioning.Input(
                    "negative", tooltip="The negative prompt; its ControlNets read the tokens of no face."
                ),
                io.Combo.Input(
                    "adapter",
                    options=instantid_choices(),
                    tooltip="InstantID's adapter (ip-adapter.bin), the file that FusedID Attention Patch takes too.",
                ),
                Identity.Input(
                    "identity", tooltip="One person, made with the face pack antelopev2. Several pictures are averaged."
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=0,
                    max=LARGEST_SIDE,
                    step=8,
                    tooltip="Of the key points' picture: take the width of the picture to be made. 0 is the photo's.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=0,
                    max=LARGEST_SIDE,
                    step=8,
                    tooltip="Of the key points' picture. 0 is the photo's.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "Where the face shall be and how it looks: a photo of anyone, or several for a batch. Open: as "
                        "in the cut-out of the identity's first picture with a face, which is close."
                    ),
                ),
                Encoder.Input("encoder", optional=True, tooltip="Finds the face in 'image'."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Image.Output(display_name="key_points", tooltip="Five points on black, for Apply ControlNet."),
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter: str) -> bool | str:
        return _problem(adapter) or True

    @classmethod
    def fingerprint_inputs(cls, adapter: str, **_: Any) -> str:
        return adapter if _problem(adapter) else community_fingerprint(adapter)

    @classmethod
    def execute(
        cls, positive: Conditioning, negative: Conditioning, adapter: str, identity: Any, width: int, height: int,
        image: Tensor | None = None, encoder: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        try:
            require_in_range(cls, {"width": width, "height": height})
            if problem := _problem(adapter):
                raise ValueError(problem)
            person = _one_person(identity)
            tokens, _ = identity_tokens(load_community_choice(adapter, AS_RECOGNISED), person)
            picture = key_points_image(person, width, height, image, encoder)
        except ValueError as error:
            raise ValueError(f"FusedIDInstantIDControl: {error}") from error
        return io.NodeOutput(
            with_controlnet_tokens(positive, tokens.positive),
            with_controlnet_tokens(negative, tokens.negative),
            picture,
        )


def instantid_choices() -> list[str]:
    """Drop-down entries of InstantID's adapters in the folders of community files."""
    return [entry for entry in community_choices() if _is_instantid(entry)]


def _is_instantid(entry: str) -> bool:
    recognised = recognised_choice(entry)
    return recognised is not None and recognised.family == INSTANTID


def _problem(adapter: str) -> str | None:
    if _is_instantid(adapter):
        return None
    found = recognised_choice(adapter)
    what = "is not there or not readable" if found is None else f"is {found.family.label}"
    folders = ", ".join(f"models/{folder}" for folder in FOLDERS)
    return (
        f"the adapter {adapter!r} {what}; needed is InstantID's ip-adapter.bin "
        f"(https://huggingface.co/InstantX/InstantID) in one of {folders}"
    )


def _one_person(identity: Any) -> Person:
    if isinstance(identity, RoutedIdentities):
        raise ValueError(
            f"got {len(identity.identities)} routed people; InstantID's ControlNet takes one person, as the tokens "
            "stand for the whole prompt. Connect one identity; for several people use the attention part alone"
        )
    if not isinstance(identity, Person):
        raise ValueError(f"got {type(identity).__name__} as identity; connect FaceEmbed or FusedIDLoadIdentity")
    return identity


def with_controlnet_tokens(conditioning: Conditioning, tokens_1ND: Tensor) -> Conditioning:
    """The same prompts; their ControlNets read `[1, N, D]` in place of the text."""
    return [[text, {**options, FOR_CONTROLNET: tokens_1ND}, *rest] for text, options, *rest in conditioning]


def key_points_image(person: Person, width: int, height: int, image: Tensor | None, encoder: Any) -> Tensor:
    """IMAGE `[B, H, W, 3]` of the points in `image`, or of the person's first picture with a face.

    Raises ValueError when there is no face to draw, or a picture without an encoder.
    """
    if image is None:
        reference = next((one for one in person.references if one.keypoints is not None), None)
        if reference is None:
            raise ValueError(
                "no picture of the identity has a found face, so there are no key points. Connect 'image' and "
                "'encoder', or make the identity from a picture with a visible face"
            )
        return pictures_to_image([_drawn(_points(reference), reference.crop, width, height)])
    if encoder is None:
        raise ValueError("'image' is connected but 'encoder' is not; Load Identity Encoder finds the face in it")
    pictures = image_to_pictures(image)
    return pictures_to_image([_drawn(_found(p, n, encoder), p, width, height) for n, p in enumerate(pictures, 1)])


def _points(reference: Reference) -> np.ndarray:
    assert reference.keypoints is not None
    return reference.keypoints


def _found(picture: np.ndarray, number: int, encoder: Any) -> np.ndarray:
    faces = find_faces(picture, encoder).faces
    if not faces:
        raise ValueError(f"no face found in picture {number} of 'image'; use one with a visible face")
    return faces[order_faces(faces, LARGEST)[0]].keypoints


def _drawn(points: np.ndarray, picture: np.ndarray, width: int, height: int) -> np.ndarray:
    own = (picture.shape[1], picture.shape[0])
    size = (width or own[0], height or own[1])
    return draw_keypoints(placed(points, own, size), *size)
