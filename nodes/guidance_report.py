"""What HybridGuidance did, in words: nothing it decides is silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..attention.guidance import IDENTITY_NAME
from ..attention.guidance_routing import GuidanceRouting
from ..attention.guidance_settings import GuidanceSettings
from ..faces.identity import Identity
from .prior import NO_PRIOR


@dataclass(frozen=True, eq=False)
class Prompt:
    """The text in the style image's space `[1, S]`, the prior that took it there, and how many parts it had."""

    embedding: Tensor
    prior: str
    num_parts: int


def file_lines(settings: GuidanceSettings, name: str, identities: Sequence[Identity]) -> list[str]:
    """The guidance file and the people."""
    people = [person.name or f"person {i}" for i, person in enumerate(identities, start=1)]
    lines = [
        f"{name}: {settings.num_tokens} token(s) of {settings.context_width} from {settings.tower_names}",
        f"faces: {', '.join(people) or 'none (zero embedding)'}",
    ]
    if settings.num_tokens == 1:
        lines.append("one token: all pixels of a region hear the same (the paper's setting)")
    if name == IDENTITY_NAME and identities:
        lines.append("the identity Linear has no face columns: the faces have no effect with it")
    return lines


def branch_lines(settings: GuidanceSettings, has_style: bool, prompt: Prompt | None, alpha: float) -> list[str]:
    """Which branches act, and what happened to the text."""
    if prompt is None:
        alone = "style image alone (no text, alpha has no effect)"
        return [alone if has_style else "face alone: no style image and no text (dropped style)"]
    if has_style:
        lines = [f"alpha {alpha:g}: {alpha:.0%} style image, {1 - alpha:.0%} text through {prompt.prior}"]
    else:
        lines = [f"text alone through {prompt.prior} (no style image, alpha has no effect)"]
    if settings.prior and prompt.prior == NO_PRIOR:
        lines.append(
            f"this guidance file was made for the prior {settings.prior}: without it the text is off its space"
        )
    if prompt.num_parts > 1:
        lines.append(
            f"the text is longer than the 77 tokens CLIP reads at once: the mean of its {prompt.num_parts} parts is "
            "used"
        )
    return lines


def routing_lines(routing: GuidanceRouting, separation: float) -> list[str]:
    """Regions, background and separation, with what the user still has to connect."""
    lines = [f"{len(routing.masks)} regions, background {routing.background}: sample with the model output"]
    if routing.background == "freeze":
        lines.append("background freeze: put noise_mask on the latent with Set Latent Noise Mask, or it is painted too")
    if separation > 0:
        lines.append(f"self-attention separation {separation:g} in the coarse layers")
    return lines
