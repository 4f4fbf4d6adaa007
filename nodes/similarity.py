"""FusedIDFaceSimilarity: how much the people in pictures look like identities; sorts and filters a batch by it."""

from __future__ import annotations

from typing import Any

import numpy as np
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..faces.identity import Identity as Person
from ..faces.preview import draw_faces
from ..faces.similarity import PictureScore, best_first, score_pictures, score_report, score_table
from .advanced import advanced
from .images import image_to_pictures, pictures_to_image
from .input_ranges import require_in_range
from .similarity_sheet import draw_comparison
from .wire_types import Encoder, Identity

PEOPLE = 4


class FaceSimilarity(io.ComfyNode):
    """Translator from sockets to `compare`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDFaceSimilarity",
            display_name="Face Similarity",
            category="FusedID",
            description=(
                "Cosine between the faces in pictures and given people, with the best assignment where there are "
                "several. A missing face counts 0. There is no universal limit between same and different: the same "
                "person in two photos gives around 0.7, strangers around 0, look-alikes up to 0.5."
            ),
            inputs=[
                Encoder.Input("encoder", tooltip="The face encoder the identities were made with."),
                io.Image.Input("image", tooltip="Pictures to judge, for example what a sampler made."),
                *(
                    Identity.Input(f"identity_{number}", optional=number > 1, tooltip=f"Person {number} to look for.")
                    for number in range(1, PEOPLE + 1)
                ),
                advanced(io.Float.Input(
                    "min_similarity", default=-1.0, min=-1.0, max=1.0, step=0.01,
                    tooltip="The output images leaves out pictures whose mean similarity is below this; the best one "
                    "always stays. -1: keep all.",
                )),
            ],
            outputs=[
                io.Float.Output(display_name="similarity", tooltip="Mean over all pictures and people, -1 to 1."),
                io.Image.Output(display_name="images", tooltip="The pictures from most to least alike, filtered."),
                io.Image.Output(display_name="preview", tooltip="Each face with the number of its person."),
                io.String.Output(display_name="report"),
                io.String.Output(display_name="csv", tooltip="picture, identity, found, cosine."),
                io.Image.Output(
                    display_name="side_by_side",
                    tooltip="The references beside every picture, each face framed with its score.",
                ),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, encoder: Any, image: Tensor, min_similarity: float, **identities: Any) -> io.NodeOutput:
        people = [person for _, person in sorted(identities.items()) if person is not None]
        try:
            require_in_range(cls, {"min_similarity": min_similarity})
            outputs = compare(encoder, image, people, min_similarity)
        except ValueError as error:
            raise ValueError(f"FusedIDFaceSimilarity: {error}") from error
        return io.NodeOutput(*outputs, ui=ui.PreviewText(outputs[3]))


def compare(
    encoder: Any, image: Tensor, people: list[Person], min_similarity: float
) -> tuple[float, Tensor, Tensor, str, str, Tensor]:
    """Everything the node does: (mean, sorted and filtered IMAGE, preview IMAGE, report, CSV, comparison IMAGE)."""
    pictures = image_to_pictures(image)
    scores = score_pictures(pictures, encoder, people)
    names = [person.name or f"identity {number}" for number, person in enumerate(people, start=1)]
    preview = pictures_to_image([_numbered(picture, score) for picture, score in zip(pictures, scores)])
    mean = float(np.mean([score.mean for score in scores]))
    kept = image[best_first(scores, min_similarity)]
    beside = pictures_to_image([draw_comparison(picture, score, people) for picture, score in zip(pictures, scores)])
    return mean, kept, preview, score_report(scores, names), score_table(scores, names), beside


def _numbered(picture: np.ndarray, score: PictureScore) -> np.ndarray:
    labels = {face: str(person) for person, face in enumerate(score.chosen, start=1) if face is not None}
    return draw_faces(picture, score.faces, labels, None)
