"""Which prompt a row of a UNet call belongs to, by the names under which the guider holds its prompts.

The host numbers the prompts of a call by their position in the list that somebody asked for: 0 is the negative prompt
in DualCFGGuider's list, and the only prompt in every pass of its own (SelfAttentionGuidance, DualModelGuider). Names do
not depend on that. A prompt that the guider does not hold is unknown, and nothing of ours acts on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Area = tuple[int, int, int, int]
"""(height, width, y, x) in latent pixels, the host's order."""
Conds = Sequence[Mapping[str, Any]]
"""The host's list of one prompt's parts: several of them for areas, combined prompts and schedules."""


class Role(Enum):
    """What a prompt is for. NEGATIVE: every prompt that the guider names otherwise than positive."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False)
class Prompt:
    """One part of a prompt in one UNet call.

    uuid: the host's name of it. values: the host's dict. borrowed: the dict is a copy of another prompt's part, made by
    the host so that a list without this area gets it: area and text are this list's, all else is the other's.
    """

    role: Role = Role.UNKNOWN
    uuid: Any = None
    values: Mapping[str, Any] = field(default_factory=dict)
    borrowed: bool = False

    @property
    def area(self) -> Area | None:
        """The part of the latent that it is for; None for all of it."""
        area = tuple(int(n) for n in self.values.get("area") or ())
        return area if len(area) == 4 else None

    def own(self, key: str) -> Any:
        """What a node wrote into the CONDITIONING under a key, or None."""
        return None if self.borrowed else self.values.get(key)

    @property
    def text(self) -> Any:
        """Its context `[1, T, D]` as the model reads it, before the host repeats it to other prompts' length."""
        return self._model_input("c_crossattn")

    @property
    def label(self) -> Any:
        """SDXL's vector `[1, P]` (pooled text and sizes), or None."""
        return self._model_input("y")

    def _model_input(self, name: str) -> Any:
        found = self.values.get("model_conds", {}).get(name)
        return None if found is None else found.cond


UNKNOWN = Prompt()


class GuiderPrompts:
    """The prompts of a guider while it samples. The host exchanges its dicts on the way, so they are read late."""

    def __init__(self, guider: Any) -> None:
        self._guider = guider

    def read(self, lists: Sequence[Conds | None]) -> dict[tuple[int, Any], Prompt]:
        """Every part of the lists that a call of the host is about, by position and uuid.

        One uuid may stand in two lists (see `Prompt.borrowed`), so the position says which is meant.
        """
        found = {}
        for position, conds in enumerate(lists):
            name = self._name(conds) if conds else None
            for values in conds or ():
                uuid = values.get("uuid")
                borrowed = name is not None and self._first_owner(uuid) not in (None, name)
                found[position, uuid] = Prompt(_role(name), uuid, values, borrowed)
        return found

    def with_uuid(self, uuid: Any) -> Prompt:
        """For calls past the host's `calc_cond_batch`: a prompt by its uuid alone."""
        name = self._first_owner(uuid)
        for values in self._named().get(name, ()):
            if values.get("uuid") == uuid:
                return Prompt(_role(name), uuid, values)
        return UNKNOWN

    def positive(self) -> Prompt | None:
        """The first positive prompt, whether it takes part in a call or not."""
        for name, conds in self._named().items():
            if _role(name) is Role.POSITIVE and conds:
                return Prompt(Role.POSITIVE, conds[0].get("uuid"), conds[0])
        return None

    def _named(self) -> Mapping[str, Conds]:
        return getattr(self._guider, "conds", None) or {}

    def _name(self, conds: Conds) -> str | None:
        """The guider's name of a list: of this very list, else of the list with these parts."""
        named = self._named()
        for name, own in named.items():
            if own is conds:
                return name
        uuids = {values.get("uuid") for values in conds}
        same = [name for name, own in named.items() if {values.get("uuid") for values in own} == uuids]
        within = [name for name, own in named.items() if {values.get("uuid") for values in own} >= uuids]
        for names in (same, within, list(dict.fromkeys(self._first_owner(uuid) for uuid in uuids))):
            if len(names) == 1:
                return names[0]
        return None

    def _first_owner(self, uuid: Any) -> str | None:
        """Whose the part was before the host copied parts between lists."""
        given = getattr(self._guider, "original_conds", None) or self._named()
        return next((name for name, one in _parts(given) if one.get("uuid") == uuid), None)


def _parts(named: Mapping[str, Conds]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, conds in named.items():
        for values in conds or ():
            yield name, values


def _role(name: str | None) -> Role:
    if name is None:
        return Role.UNKNOWN
    return Role.POSITIVE if name.startswith("positive") else Role.NEGATIVE
