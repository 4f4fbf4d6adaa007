"""FusedIDCommunityOptions: how community files are used, where their makers left a choice."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.v0_0_2 import io

from ..attention.community.orthogonal import ORTHOGONAL
from ..attention.community.pulid_methods import DEFAULT, METHODS, MOST_ZERO_TOKENS, PulidMethod, choose_method
from .input_ranges import require_in_range
from .wire_types import Community

OF_METHOD = "of the method"


@dataclass(frozen=True)
class CommunityOptions:
    """pulid: how PuLID's face branch is used; other families do not read it."""

    pulid: PulidMethod = DEFAULT


class FusedIDCommunityOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDCommunityOptions",
            display_name="FusedID Community Options",
            category="FusedID",
            description="How PuLID files are used by FusedID Attention Patch.",
            inputs=[
                io.Combo.Input(
                    "pulid_method",
                    options=list(METHODS),
                    default=DEFAULT.name,
                    tooltip=(
                        "fidelity, style, neutral: as in PuLID_ComfyUI; fidelity is its default and holds without this "
                        "node. official v1.1: where the official demo starts."
                    ),
                ),
                io.Int.Input(
                    "zero_tokens",
                    default=-1,
                    min=-1,
                    max=MOST_ZERO_TOKENS,
                    optional=True,
                    tooltip=(
                        "Empty tokens beside the face's: more follow the prompt better and are less like the person. "
                        "-1 is the method's number (fidelity 8, style 16, neutral 0, official v1.1 20)."
                    ),
                ),
                io.Combo.Input(
                    "orthogonal",
                    options=[OF_METHOD, *ORTHOGONAL],
                    default=OF_METHOD,
                    optional=True,
                    tooltip=(
                        "What of the face lies along the text's output is taken away: not at all, whole (v1), or where "
                        "a pixel does not look at the face (v2; PuLID_ComfyUI: one amount for the whole picture)."
                    ),
                ),
            ],
            outputs=[Community.Output(display_name="community")],
        )

    @classmethod
    def execute(cls, pulid_method: str, zero_tokens: int = -1, orthogonal: str = OF_METHOD) -> io.NodeOutput:
        given = {"pulid_method": pulid_method, "zero_tokens": zero_tokens, "orthogonal": orthogonal}
        try:
            require_in_range(cls, given)
            zeros = None if zero_tokens < 0 else zero_tokens
            projection = None if orthogonal == OF_METHOD else orthogonal
            return io.NodeOutput(CommunityOptions(choose_method(pulid_method, zeros, projection)))
        except ValueError as error:
            raise ValueError(f"FusedIDCommunityOptions: {error}") from error
