"""FusedIDRecordAttention: notes, while a MODEL samples, how much every pixel looks at whom."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension as extension
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..attention.schedule import Window
from .advanced import advanced
from .attention_recording import RECORDINGS, AttentionRecording, listening
from .fusion_setup import percent_window, require_sites
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
            require_sites(model)
            return io.NodeOutput(*recorded(model, percent_window(model, start_percent, end_percent)))
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error


def recorded(model: Any, window: Window) -> tuple[Any, AttentionRecording]:
    """A clone of the MODEL that records the steps inside a window, and the recording; every run starts it anew."""
    clone, recording = model.clone(), AttentionRecording()
    key = f"fusedid_recording_{id(recording)}"
    clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, key, _offer(recording, window))
    clone.add_callback_with_key(extension.CallbacksMP.ON_PRE_RUN, key, lambda *_: recording.clear())
    return clone, recording


def _offer(recording: AttentionRecording, window: Window) -> Any:
    def apply_model(
        executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = None, **named: Any,
    ) -> Any:  # fmt: skip
        options = transformer_options or {}
        if window.always or window.contains(float(t.flatten()[0])):
            options = {**options, RECORDINGS: (*listening(options), recording)}
        return executor(x, t, c_concat, c_crossattn, control, options, **named)

    return apply_model
