"""FaceEmbed: photos of one person become an identity, with a numbered preview and a report."""

from __future__ import annotations

import re
from typing import Any

import comfy.utils
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..faces.align import DEFAULT_MARGIN
from ..faces.embed import POLICIES, embed_faces, report_text
from ..faces.identity import Identity as Person
from ..faces.mix import require_encoder
from ..faces.preview import draw_faces
from ..faces.quality import QualityGate
from ..faces.select import LARGEST, ORDERS
from .advanced import advanced
from .images import image_to_pictures, pictures_to_image
from .input_ranges import require_in_range
from .wire_types import Encoder, Identity


class FaceEmbed(io.ComfyNode):
    """Translator from sockets to `embed`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaceEmbed",
            display_name="Face Embed",
            category="FusedID",
            description=(
                "Finds one face in each picture of a batch, which all show the same person, and makes an identity of "
                "them. Small, tight and padded pictures are tried by themselves; the preview numbers every face found."
            ),
            inputs=_inputs(),
            outputs=[
                Identity.Output(display_name="identity"),
                io.Image.Output(display_name="preview"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        try:
            require_in_range(cls, inputs)
            return io.NodeOutput(*embed(**inputs))
        except ValueError as error:
            raise ValueError(f"FaceEmbed: {error}") from error


def _inputs() -> list[Any]:
    return [
        Encoder.Input("encoder", tooltip="From Load Identity Encoder."),
        io.Image.Input(
            "image", tooltip="One or more pictures of ONE person; grey, RGB or with transparency (laid over white)."
        ),
        io.Combo.Input(
            "face", options=list(ORDERS), default=LARGEST,
            tooltip="In which order faces are numbered where a picture has several. most similar needs similar_to.",
        ),
        io.Int.Input(
            "number", default=1, min=1, max=99,
            tooltip="Which face of that order is used, from 1; the preview shows the numbers, the used face is green.",
        ),
        io.Combo.Input(
            "no_face", options=list(POLICIES), default=POLICIES[0],
            tooltip="What happens to a picture without a usable face. error: stop and say which picture; skip image: "
            "go on with the others; whole image: use the picture itself as reference, without an embedding (drawings).",
        ),
        advanced(io.String.Input(
            "weights", default="",
            tooltip="One number per picture, such as 1, 0.5, 2: its share in the identity. Empty: all the same. "
            "Numbers are normalised; 0 keeps a picture out of the embedding.",
        )),
        advanced(io.Int.Input(
            "min_size", default=0, min=0, max=4096,
            tooltip="Quality gate: the face's shorter side in pixels must be at least this. 0: any; 64 is sensible.",
        )),
        advanced(io.Float.Input(
            "min_sharpness", default=0.0, min=0.0, max=10000.0, step=1.0,
            tooltip="Quality gate: variance of the Laplacian of the face; the report shows it. 0: any; blurred faces "
            "are below about 50.",
        )),
        advanced(io.Float.Input(
            "min_score", default=0.0, min=0.0, max=1.0, step=0.01,
            tooltip="Quality gate: how sure the detector must be, 0 to 1. 0: its own limit (0.5; 0.7 for opencv).",
        )),
        advanced(io.Float.Input(
            "margin", default=DEFAULT_MARGIN, min=0.0, max=2.0, step=0.05,
            tooltip="How much of the surroundings the reference shows on each side, in parts of the face's longer "
            "side. 0: the face alone; 0.3: hair and chin; 1: shoulders.",
        )),
        io.String.Input("name", default="", tooltip="The person's name for reports; no effect on pictures."),
        Identity.Input(
            "similar_to", optional=True, tooltip="For the order 'most similar': the person to look for in each picture."
        ),
        Identity.Input(
            "add_to", optional=True,
            tooltip="An identity to which these pictures are added: for photos of the same person in another size.",
        ),
    ]  # fmt: skip


def embed(
    *, encoder: Any, image: Tensor, face: str, number: int, no_face: str, weights: str, min_size: int,
    min_sharpness: float, min_score: float, margin: float, name: str,
    similar_to: Person | None = None, add_to: Person | None = None,
) -> tuple[Person, Tensor, str]:  # fmt: skip
    """Everything the node does. Returns (identity, preview IMAGE `[B, H, W, 3]`, report)."""
    if add_to is not None:
        require_encoder(add_to, encoder.fingerprint)
    pictures = image_to_pictures(image)
    bar = comfy.utils.ProgressBar(len(pictures))
    embedded = embed_faces(
        pictures,
        encoder,
        which=face,
        index=number,
        like=similar_to,
        policy=no_face,
        gate=QualityGate(min_size, min_sharpness, min_score),
        weights=parse_weights(weights),
        margin=margin,
        name=name.strip(),
        progress=bar.update_absolute,
    )
    drawn = [
        draw_faces(picture, report.detections.faces, report.order, report.chosen if report.used else None)
        for picture, report in zip(pictures, embedded.reports)
    ]
    identity = embedded.identity if add_to is None else _joined(add_to, embedded.identity)
    return identity, pictures_to_image(drawn), report_text(embedded, encoder.provider)


def parse_weights(text: str) -> list[float]:
    """`1, 0.5 2` or `1; 0.5` as numbers; empty as none. ValueError for anything else."""
    words = [word for word in re.split(r"[\s,;]+", text.strip()) if word]
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"the weights {text!r} are no list of numbers; write for example 1, 0.5, 2") from None


def _joined(first: Person, second: Person) -> Person:
    return Person((*first.references, *second.references), second.encoder, second.name or first.name)
