"""Self-attention separation in a MODEL: people look less at each other in the coarse layers (METHOD 1.4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention.separation import check_amount, memberships, separated_attention
from ..attention.sites import Site, discover_sites, layer_groups
from .host.effect import Acting
from .host.install import installed
from .host.layer_call import Change, LayerCall
from .host.model_call import ModelCall
from .host.place import Place

LABEL = "FusedID self-attention separation"
MOST_KEPT = 64


class SeparationEffect:
    """Resolved masks `[I, H, W]` and the amount; remembers who owns which token."""

    label = LABEL
    kind = "separation"  # nothing is ever separated twice: a second node's masks and amount replace the first's
    attention = "attn1"

    def __init__(self, masks_IHW: Tensor, amount: float, sites: tuple[Site, ...]) -> None:
        coarse = layer_groups(sites)["coarse"]
        self._masks, self._amount = masks_IHW, amount
        self.sites = {site.key: site for site in sites if site.path in coarse}
        self._members: dict[Any, Tensor] = {}

    def begin(self, _call: ModelCall) -> Acting:
        """See `host.effect.Effect`."""
        return Acting(LABEL, self.attention, self.sites, self._change)

    def _change(self, _site: Site, call: LayerCall) -> Change:
        call.require_grid("the people", "set 'separation' of the router to 0")
        change = []
        for rows, place in _rows(call):
            q, k, v = call.q[rows], call.k[rows], call.v[rows]
            members = self._members_at(call, place)
            out = separated_attention(q, k, v, members, self._amount, heads=call.heads, attend=call.attend)
            change.append((rows, out))
        return change

    def _members_at(self, call: LayerCall, place: Place) -> Tensor:
        """`attention.separation.memberships` of the tokens of a place."""
        key = (call.grid, place.shown, call.q.device)
        if key not in self._members:
            if len(self._members) >= MOST_KEPT:
                self._members.clear()
            found = memberships(place.masks(self._masks), call.grid, place.elsewhere(self._masks))
            self._members[key] = found.to(call.q.device)
        return self._members[key]


def patch_separation(model: Any, masks_IHW: Tensor, amount: float) -> Any:
    """A clone of the MODEL whose coarse self-attention holds people apart; an unpatched clone when `amount` is 0.

    Receives: resolved masks `[I, H, W]`; amount in [0, 20], the score a token of another person loses.
    """
    check_amount(amount)
    if amount == 0.0:
        return model.clone()
    return installed(model, SeparationEffect(masks_IHW, amount, discover_sites(model.model.diffusion_model)))


def _rows(call: LayerCall) -> list[tuple[slice, Place]]:
    """The rows of every prompt with their place; one slice when all show the same. It holds for every prompt."""
    found = [(chunk.rows, call.place(chunk)) for chunk in call.chunks]
    if len({place for _, place in found}) == 1:
        return [(slice(0, len(call.q)), found[0][1])]
    return found
