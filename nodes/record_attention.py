"""FusedIDRecordAttention: notes, while a MODEL samples, how much every pixel looks at whom."""

from __future__ import annotations

from typing import Any, ClassVar

from comfy_api.v0_0_2 import io

from ..attention.schedule import check_percents
from ..attention.sites import Site
from .advanced import advanced
from .attention_recording import AttentionRecording
from .fusion_setup import require_sites
from .host.effect import Key
from .host.install import installed
from .host.model_call import ModelCall
from .input_ranges import require_in_range
from .wire_types import Recording

NODE = "FusedIDRecordAttention"


class RecordAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Record Attention",
            category="FusedID",
            description="Notes while sampling how much every pixel looks at whom, for Attention Map. The picture stays "
            "the same bit for bit; sampling takes a little longer.",
            inputs=[
                io.Model.Input("model", tooltip="From FusedID Attention Patch; its output goes to the sampler."),
                advanced(io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Fraction of the sampling run at which recording begins.",
                )),
                advanced(io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Fraction of the sampling run after which it ends. Early steps show the layout, late ones "
                    "the details.",
                )),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                Recording.Output(display_name="recording", tooltip="Filled by the sampler; for Attention Map."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, start_percent: float, end_percent: float) -> io.NodeOutput:
        try:
            require_in_range(cls, {"start_percent": start_percent, "end_percent": end_percent})
            check_percents(start_percent, end_percent)
            require_sites(model)
            return io.NodeOutput(*recorded(model, start_percent, end_percent))
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error


class RecordingEffect:
    """Lets a recording listen to the calls between two fractions of a run; every run starts it anew."""

    label = NODE
    kind = ""
    attention = "attn2"
    sites: ClassVar[dict[Key, Site]] = {}  # it listens to those who act

    def __init__(self, recording: AttentionRecording, start: float, end: float) -> None:
        self._recording, self._start, self._end = recording, start, end

    def begin(self, call: ModelCall) -> None:
        """See `host.effect.Effect`."""
        if call.sampling is not None:
            call.sampling.keep(self, self._recording.clear)
        if call.within(self._start, self._end):
            call.recordings.append(self._recording)


def recorded(model: Any, start: float, end: float) -> tuple[Any, AttentionRecording]:
    """A clone of the MODEL that records the steps between two fractions of a run, and the recording."""
    recording = AttentionRecording()
    return installed(model, RecordingEffect(recording, start, end)), recording
