"""FusedIDMix: several people become one, by weight (METHOD 2.2)."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..faces.identity import Identity as Person
from ..faces.mix import mix_identities, mix_report
from .input_ranges import require_in_range
from .wire_types import Identity

PEOPLE = 6


class MixIdentities(io.ComfyNode):
    """Translator from sockets to `mix_identities`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FusedIDMix",
            display_name="Mix Identities",
            category="FusedID",
            description=(
                "A new face between several people: unit embeddings are averaged by weight and scaled back to the "
                "encoder's norm. The report says how near the mix is to each of them."
            ),
            inputs=[entry for number in range(1, PEOPLE + 1) for entry in _person(number)]
            + [io.String.Input("name", default="mix", tooltip="The mix's name for reports.")],
            outputs=[
                Identity.Output(display_name="identity"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, name: str, **inputs: Any) -> io.NodeOutput:
        people, weights = _connected(inputs)
        try:
            require_in_range(cls, inputs)
            mix = mix_identities(people, weights, name=name.strip())
        except ValueError as error:
            raise ValueError(f"FusedIDMix: {error}") from error
        return io.NodeOutput(mix.identity, mix_report(mix, [person.name for person in people]))


def _person(number: int) -> list[Any]:
    return [
        Identity.Input(
            f"identity_{number}", optional=number > 1, tooltip=f"Person {number}; all need the same face encoder."
        ),
        io.Float.Input(
            f"weight_{number}", default=1.0, min=0.0, max=10.0, step=0.01,
            tooltip=f"Share of person {number}, relative to the others: 1 and 1 is half and half, 3 and 1 three "
            "quarters. 0 leaves the person out. No effect without a connected identity.",
        ),
    ]  # fmt: skip


def _connected(inputs: dict[str, Any]) -> tuple[list[Person], list[float]]:
    numbers = [number for number in range(1, PEOPLE + 1) if inputs.get(f"identity_{number}") is not None]
    return [inputs[f"identity_{n}"] for n in numbers], [float(inputs.get(f"weight_{n}", 1.0)) for n in numbers]
