"""One call of the host's model: whose rows are in it, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from .messages import show_on_running_node
from .place import VIEW, Place, find_part, within
from .prompts import UNKNOWN, Area, Prompt, Role
from .sampling import SAMPLING, STEP, Sampling, Step, size_of

Kept = TypeVar("Kept")

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
    recordings: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampling = self.options.get(SAMPLING)
        self._step: Step | None = self.options.get(STEP)
        kinds = tuple(self.options.get("cond_or_uncond") or (0,))
        uuids = self.options.get("uuids") or (None,) * len(kinds)
        noted = {} if self._step is None else self._step.prompts
        prompts = tuple(noted.get(named) or self._by_uuid(named[1]) for named in zip(kinds, uuids, strict=True))
        times = self._times(len(kinds))
        self.kinds, self.prompts = kinds * times, prompts * times
        self._kept: dict[Hashable, Any] = {}

    def _times(self, num_prompts: int) -> int:
        """How often all prompts follow each other: packs that cut a latent into tiles stack them so."""
        wanted = num_prompts * (len(self.x) if self._step is None else len(self._step.x))
        return len(self.x) // wanted if self._step is not None and len(self.x) % wanted == 0 else 1

    @property
    def views_differ(self) -> bool:
        """Whether rows of the call show different parts of the whole picture, as they were told one by one."""
        told = self.options.get(VIEW)
        return told is not None and not isinstance(told[0], float)

    def place(self, number: int, picture: int | None = None) -> Place:
        """The part of the whole picture that the rows of one prompt in `prompts` show. picture: one of its batch."""
        return self.keep(("place", number, picture), lambda: self._place(number, picture))

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """`make()`, once in this call."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _place(self, number: int, picture: int | None) -> Place:
        prompt, batch = self.prompts[number], len(self.x) // len(self.prompts)
        rows = self.x[number * batch : (number + 1) * batch]
        told = self.options.get(VIEW)
        if told is not None:
            if not self.views_differ:
                return Place(size_of(self.x), told, prompt.area)
            if picture is None:
                raise ValueError(
                    "the pictures of a batch show different parts of the whole picture, and another node repeats their "
                    "rows, so people cannot be placed in them. Sample one part at a time"
                )
            return Place(size_of(self.x), told[number * batch + picture], prompt.area)
        if self.sampling is None or self._step is None:
            return Place(size_of(self.x), None, prompt.area)
        step = self._part(self._step.x, self.sampling.latent_hw, self.sampling.x)
        area, size = prompt.area, size_of(self._step.x)
        if size_of(rows) != (size if area is None else area[:2]):  # a tile of what the host made for the prompt
            area = self._part(rows, size if area is None else area[:2], self._of_step(area))
        return Place(self.sampling.latent_hw, None, within(area, size, step))

    def _of_step(self, area: Area | None) -> Tensor:
        assert self._step is not None
        height, width, y, x = area or (*size_of(self._step.x), 0, 0)
        return self._step.x[..., y : y + height, x : x + width]

    def _part(self, part: Tensor, whole_hw: tuple[int, int], whole: Tensor | None) -> Area | None:
        """Where a part lies in the whole; None: it is the whole, or taken for it."""
        if size_of(part) == tuple(whole_hw):
            return None
        found = None if whole is None else find_part(part, whole)
        if found is None and self.sampling is not None:
            self.sampling.keep("unknown part", _say_unknown_part)
        return found

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


def _say_unknown_part() -> None:
    show_on_running_node(
        "a node evaluates the picture in parts, and where they lie cannot be told. People's regions are laid over each "
        "part as over the whole picture, so they may get each other's face. Use FusedIDCutPicture for parts"
    )
