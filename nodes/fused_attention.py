"""FusedIDAttentionPatch: puts faces into a MODEL's attention (METHOD 1)."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..attention.adapter import COMBINE_MODES, TEXT_MODES, TIMESTEP_MODES
from ..attention.community.families import AS_RECOGNISED, VARIANTS
from ..attention.fusion import LENGTH_MODES
from ..attention.sites import LAYER_GROUPS
from ..attention.storage import PLACES, PRECISIONS
from .adapter_choice import FROM_ADAPTER, adapter_choices, adapter_fingerprint
from .advanced import advanced
from .fusion_setup import patch_model
from .input_ranges import require_in_range
from .wire_types import Community, Identity, Routed

NODE = "FusedIDAttentionPatch"


class FusedIDAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        modes = [FROM_ADAPTER]
        return io.Schema(
            node_id="FusedIDAttentionPatch",
            display_name="FusedID Attention Patch",
            category="FusedID",
            description="Puts one or several people into the pictures an SD1.5 or SDXL model makes.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2 or SDXL model, with its LoRAs already applied."),
                io.Combo.Input(
                    "adapter",
                    options=adapter_choices(),
                    tooltip=(
                        "FusedID adapter from models/fusedid; an IP-Adapter, FaceID, InstantID or PuLID file you "
                        "already have; or training-free, which needs no file."
                    ),
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The model's VAE: encodes the reference face. Only community adapters need none.",
                ),
                Identity.Input(
                    "identity",
                    optional=True,
                    tooltip="One person, from FaceEmbed or FusedIDLoadIdentity. Connect this or 'routed'.",
                ),
                Routed.Input(
                    "routed", optional=True, tooltip="Several people with their masks, from MultiIDMaskRouter."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip=(
                        "0 is the unpatched model bit for bit, 1 the paper, above 1 a larger share of attention for "
                        "the face."
                    ),
                ),
                advanced(
                    io.Float.Input(
                        "key_strength",
                        default=1.0,
                        min=0.0,
                        max=10.0,
                        step=0.05,
                        optional=True,
                        tooltip="Factor on the face keys: how sharply pixels choose parts of the face. 1 is the paper.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "value_strength",
                        default=1.0,
                        min=0.0,
                        max=10.0,
                        step=0.05,
                        optional=True,
                        tooltip="Factor on the face values: how strongly they act once chosen. 1 is the paper.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "attention_scale",
                        default=1.0,
                        min=0.05,
                        max=10.0,
                        step=0.05,
                        optional=True,
                        tooltip="Factor on all attention scores. 1 is the paper, higher is sharper.",
                    )
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Fraction of the sampling run at which the identity begins to act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Fraction of the sampling run after which it no longer acts.",
                ),
                advanced(
                    io.Combo.Input(
                        "layers",
                        options=list(LAYER_GROUPS),
                        default="all",
                        optional=True,
                        tooltip=(
                            "Which layers see the face: all; by place (down, middle, up); coarse (layout, head shape) "
                            "or fine (features, skin)."
                        ),
                    )
                ),
                advanced(
                    io.Int.Input(
                        "reference_size",
                        default=0,
                        min=0,
                        max=2048,
                        step=64,
                        optional=True,
                        tooltip=(
                            "Side of the reference in pixels; 0 is the size the adapter was trained with. Smaller is "
                            "faster."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "timestep",
                        options=[*modes, *TIMESTEP_MODES],
                        optional=True,
                        default=FROM_ADAPTER,
                        tooltip=(
                            "clean: the reference runs once and is cached. matched: it is noised and run again every "
                            "step (slower). Training-free means matched."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "length",
                        options=[*modes, *LENGTH_MODES],
                        optional=True,
                        default=FROM_ADAPTER,
                        tooltip=(
                            "balanced: the face's share does not depend on the reference's size or number. paper: it "
                            "does."
                        ),
                    )
                ),
                io.Combo.Input(
                    "combine",
                    options=[*modes, *COMBINE_MODES],
                    optional=True,
                    default=FROM_ADAPTER,
                    tooltip=(
                        "fused: one softmax over text and face (the paper). decoupled: two, added, as IP-Adapter does."
                    ),
                ),
                advanced(
                    io.Combo.Input(
                        "apply_to",
                        options=["positive", "both"],
                        optional=True,
                        default="positive",
                        tooltip=(
                            "Which prompts see the face. both is rarely wanted: it cancels in classifier-free guidance."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "reference_text",
                        options=[*modes, *TEXT_MODES],
                        optional=True,
                        default=FROM_ADAPTER,
                        tooltip="Prompt of the reference pass: the empty one, or the positive prompt of the picture.",
                    )
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "Only to encode the empty prompt of the reference pass, when the adapter carries none or "
                        "training-free shall not read the positive prompt."
                    ),
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip=(
                        "For community adapters that look at the face through CLIP; the error names the model they "
                        "want."
                    ),
                ),
                advanced(
                    io.Combo.Input(
                        "variant",
                        options=[AS_RECOGNISED, *VARIANTS],
                        optional=True,
                        tooltip="For community files that cannot be told apart by their content.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "lora_strength",
                        default=1.0,
                        min=-2.0,
                        max=2.0,
                        step=0.05,
                        optional=True,
                        tooltip="Strength of the LoRA inside FaceID files.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "structure",
                        default=1.0,
                        min=0.0,
                        max=5.0,
                        step=0.05,
                        optional=True,
                        tooltip="FaceID-PlusV2: weight of the face's structure against its identity.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "adain",
                        default=False,
                        optional=True,
                        tooltip=(
                            "Training-free only: queries and keys take on the reference's statistics (AdaIN). Closer "
                            "to the reference, its light and colours included."
                        ),
                    )
                ),
                advanced(
                    io.Float.Input(
                        "reference_tokens",
                        default=1.0,
                        min=0.1,
                        max=1.0,
                        step=0.05,
                        optional=True,
                        tooltip=(
                            "Share of the reference's tokens that is kept; like ones are merged. 0.5 makes the face's "
                            "part of a step and of the memory about half, at a small loss. 1 merges nothing."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "cache_precision",
                        options=list(PRECISIONS),
                        optional=True,
                        default="model",
                        tooltip=(
                            "How the cached reference is stored. model: exact. fp8: 8 bits, half the memory of fp16, "
                            "nearly the same picture."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "cache_device",
                        options=list(PLACES),
                        optional=True,
                        default="model",
                        tooltip=(
                            "Where it is stored. model: on the model's device. cpu: in RAM, fetched layer by layer "
                            "while the layer before computes; saves GPU memory."
                        ),
                    )
                ),
                Community.Input(
                    "community",
                    optional=True,
                    tooltip="From FusedID Community Options: how PuLID's face is added. Open means fidelity.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model"), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str, **_: Any) -> str:
        return adapter_fingerprint(adapter)

    @classmethod
    def execute(cls, model: Any, adapter: str, **given: Any) -> io.NodeOutput:
        try:
            require_in_range(cls, given)
            return io.NodeOutput(*patch_model(model, adapter, **given))
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
