"""One call of the host's model: whose rows are in it, and what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .place import VIEW, View
from .prompts import UNKNOWN, Prompt, Role
from .sampling import SAMPLING, STEP, Sampling, Step

POOLED_WIDTH = 1280
"""Of SDXL's label vector, the part that is the pooled text."""


class Text(NamedTuple):
    """A prompt as the UNet reads it: context `[1, T, D]`, and SDXL's pooled text `[1, P]` or None."""

    context: Tensor
    pooled: Tensor | None


@dataclass(eq=False)
class ModelCall:
    """base: the host's BaseModel, loaded and patched. x: `[B, 4, h, w]`. sigma: noise level per row `[B]`.

    context `[B, T, D]` and label `[B, P]`: as the UNet will read them, rows in the order of `prompts`, all of equal
    length. prompts: one per chunk of B / len(prompts) rows. kinds: the host's numbers for them (`cond_or_uncond`),
    which other packs go by. recordings: who listens to this call.
    """

    base: Any
    x: Tensor
    sigma: Tensor
    context: Tensor | None
    label: Tensor | None
    options: Mapping[str, Any]
    prompts: Sequence[Prompt] = field(init=False)
    kinds: Sequence[int] = field(init=False)
    sampling: Sampling | None = field(init=False)
    latent_hw: tuple[int, int] = field(init=False)
    recordings: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampling = self.options.get(SAMPLING)
        step: Step | None = self.options.get(STEP)
        self.kinds = tuple(self.options.get("cond_or_uncond") or (0,))
        uuids = self.options.get("uuids") or (None,) * len(self.kinds)
        noted = {} if step is None else step.prompts
        self.prompts = tuple(
            noted.get(named) or self._by_uuid(named[1]) for named in zip(self.kinds, uuids, strict=True)
        )
        self.latent_hw = (self.x.shape[-2], self.x.shape[-1]) if step is None else step.latent_hw

    @property
    def view(self) -> View | None:
        """The part of the whole picture that is sampled, where somebody told it."""
        return self.options.get(VIEW)

    def has(self, *roles: Role) -> bool:
        """Whether a prompt of these roles is in the call: the host may run each in a call of its own."""
        return any(prompt.role in roles for prompt in self.prompts)

    def within(self, start: float, end: float) -> bool:
        """Whether the call lies between two fractions of the run. Waits for the device only if there is an outside."""
        if (start, end) == (0.0, 1.0):
            return True
        if self.sampling is None:
            return False
        return self.sampling.window(self.base, start, end).contains(float(self.sigma.flatten()[0]))

    def text(self, prompt: Prompt) -> Text | None:
        """A prompt's own text, the same in whatever company it is sampled; it need not be in this call."""
        context, label = prompt.text, prompt.label
        if context is None:
            chunk = next((number for number, one in enumerate(self.prompts) if one.uuid == prompt.uuid), None)
            if chunk is None or self.context is None:
                return None
            row = chunk * (self.context.shape[0] // len(self.prompts))
            context, label = self.context[row : row + 1], None if self.label is None else self.label[row : row + 1]
        return Text(context[:1], None if label is None else label[:1, :POOLED_WIDTH])

    def positive(self) -> Prompt | None:
        """The run's first positive prompt."""
        return None if self.sampling is None else self.sampling.prompts.positive()

    def _by_uuid(self, uuid: Any) -> Prompt:
        return UNKNOWN if self.sampling is None or uuid is None else self.sampling.prompts.with_uuid(uuid)
