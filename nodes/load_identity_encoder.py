"""LoadIdentityEncoder: a face pack on disk (or chosen for download) becomes the encoder of the other face nodes."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..faces.opencv_backend import NAME as OPENCV
from ..faces.pack_choice import DEFAULT_DET_SIZE, choice_name, choice_problem, choice_stamp, open_encoder, pack_choices
from ..faces.packs import RESEARCH
from ..faces.providers import AUTO, available_providers, choose_provider, provider_choices
from .advanced import advanced
from .folders import insightface_roots
from .input_ranges import require_in_range
from .wire_types import Encoder


class LoadIdentityEncoder(io.ComfyNode):
    """Translator from widgets to `open_encoder`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadIdentityEncoder",
            display_name="Load Identity Encoder",
            category="FusedID",
            description=(
                "Loads the models that find and recognise faces: an InsightFace pack from "
                "models/insightface/models/<pack>, or OpenCV's YuNet and SFace from models/insightface/opencv. "
                "Nothing is downloaded unless an entry marked 'download' is chosen and run."
            ),
            inputs=[
                io.Combo.Input(
                    "face_pack", options=pack_choices(insightface_roots()),
                    tooltip="Packs on disk with their licence, then known packs that can be downloaded (licence and "
                    f"size in brackets; InsightFace's packs: {RESEARCH}). An adapter or identity made with one pack "
                    "needs the same pack again. opencv is free for commercial use.",
                ),
                io.Combo.Input(
                    "provider", options=provider_choices(), default=AUTO,
                    tooltip="Where the face models run: what the installed onnxruntime really offers. auto: CUDA if "
                    "there, else CPU (well below a second per picture). Ignored by opencv.",
                ),
                advanced(io.Int.Input(
                    "det_size", default=DEFAULT_DET_SIZE, min=128, max=1920, step=32,
                    tooltip="Pixels to which a picture's longer side is scaled before faces are searched, 128 to 1920. "
                    "Larger finds smaller faces (1280 for groups) and costs with its square. Smaller sizes and "
                    "padding are tried by themselves when nothing is found.",
                )),
            ],
            outputs=[Encoder.Output(display_name="encoder")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, face_pack: str) -> bool | str:
        # A workflow saved before a download names an entry that the drop-down no longer has, and stays good.
        return choice_problem(face_pack, insightface_roots()) or True

    @classmethod
    def fingerprint_inputs(cls, face_pack: str, provider: str, det_size: int) -> str:
        """Other files under the same name are loaded anew."""
        return f"{choice_stamp(face_pack, insightface_roots())} {provider} {det_size}"

    @classmethod
    def execute(cls, face_pack: str, provider: str, det_size: int) -> io.NodeOutput:
        try:
            require_in_range(cls, {"det_size": det_size})
            if choice_name(face_pack) != OPENCV:
                choose_provider(provider, available_providers())
            return io.NodeOutput(open_encoder(face_pack, insightface_roots(), det_size=det_size, provider=provider))
        except ValueError as error:
            raise ValueError(f"LoadIdentityEncoder: {error}") from error
