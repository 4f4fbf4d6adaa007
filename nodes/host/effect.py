"""What a node does to the attention of a MODEL: an effect, and the layers in which it acts during one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...attention.sites import Site
from .layer_call import Change, LayerCall, TextRouter
from .model_call import ModelCall

Key = tuple[Any, ...]
"""(block kind, number, transformer index): the host's name of a transformer block."""


@dataclass(frozen=True, eq=False)
class Acting:
    """An effect that acts in one call. attention: `attn1` or `attn2`. sites: where, by the host's names.

    change: which rows of a layer get another output, and which; called once per site.
    """

    label: str
    attention: str
    sites: Mapping[Key, Site]
    change: Callable[[Site, LayerCall], Change]


@dataclass(frozen=True, eq=False)
class Routing:
    """An effect that decides in one call which text the queries of cross-attention see."""

    label: str
    sites: Mapping[Key, Site]
    router: TextRouter


class Effect(Protocol):
    """label: the node's name, for messages. kind: a second effect of a kind that is not empty replaces the first.

    attention (`attn1` or `attn2`) and sites: where it may act.
    """

    label: str
    kind: str
    attention: str
    sites: Mapping[Key, Site]

    def begin(self, call: ModelCall) -> Acting | Routing | None:
        """What acts in this call, None for nothing. Raises ValueError with what the user must change."""
        ...


class Effects:
    """All effects on a MODEL, in the order in which they were put there. Never changed: adding makes a new one.

    The host copies options deeply at clones, some versions with all objects in them; this one stays one.
    """

    def __init__(self, members: Sequence[Effect] = ()) -> None:
        self.members = tuple(members)
        self.slots: dict[tuple[str, Key], Any] = {}
        """The layers' functions, kept from call to call, so that a compiled UNet meets the same ones."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Effects:
        return self

    def with_effect(self, effect: Effect) -> Effects:
        """These and one more."""
        return Effects([one for one in self.members if not effect.kind or one.kind != effect.kind] + [effect])


@dataclass(eq=False)
class Acts:
    """What acts in one call of the model, per layer, and in which layers it has acted."""

    call: ModelCall
    acting: Sequence[Acting]
    routing: Routing | None = None
    others: dict[tuple[str, Key], Any] = field(default_factory=dict)
    """Per layer, what another pack put there."""
    replaced: dict[str, dict[Key, Any]] = field(default_factory=dict)
    """What the model was told to ask in this call, by attention and layer."""
    acted: set[tuple[str, Key]] = field(default_factory=set)

    def sites(self) -> dict[tuple[str, Key], Site]:
        """All layers in which something acts."""
        found = {(one.attention, key): site for one in self.acting for key, site in one.sites.items()}
        if self.routing is not None:
            found |= {("attn2", key): site for key, site in self.routing.sites.items()}
        return found

    def at(self, attention: str, key: Key) -> list[Acting]:
        """Who acts in one layer."""
        return [one for one in self.acting if one.attention == attention and key in one.sites]
