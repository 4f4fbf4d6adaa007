"""FusedIDDoctor: one report on versions, providers, models and, of a connected MODEL, its patched layers."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io, ui

from ..faces.doctor import diagnose, format_report
from .doctor_report import cuda_findings, folder_findings, host_findings, model_findings
from .folders import insightface_roots


def examine(model: Any | None = None) -> str:
    """The whole report as text; of a MODEL also its patched layers."""
    findings = [*host_findings(), *diagnose(insightface_roots()), *cuda_findings(), *folder_findings()]
    return format_report([*findings, *(model_findings(model) if model is not None else [])])


class FusedIDDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDDoctor",
            display_name="Doctor",
            category="FusedID",
            description="Lists versions, the onnxruntime provider really in use, face models and adapters found and "
            "missing (with licence and where to put them), and how many layers of a model are patched. "
            "Paste its report into bug reports.",
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Optional: connect the MODEL that goes into the sampler to see which pack replaces how "
                    "many of its cross-attention layers.",
                ),
            ],
            outputs=[io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        # What it reports lies outside the graph, so it runs every time: NaN equals nothing.
        return float("nan")

    @classmethod
    def execute(cls, model: Any | None = None) -> io.NodeOutput:
        report = examine(model)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
