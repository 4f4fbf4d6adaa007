"""Multi-identity cross-attention (METHOD 2.3) in a MODEL: queries of a region see one person's guidance tokens only.

A CONDITIONING entry for several people carries its `GuidanceRouting`; the rows of a call are found by it, not by where
they stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..attention.guidance_routing import GuidanceRouting, guidance_regions, intersect
from ..attention.routing import Region
from ..attention.sites import Site, discover_sites
from .guidance_conditioning import ROUTING_KEY
from .host.effect import Routing
from .host.install import installed
from .host.layer_call import LayerCall, Rows
from .host.model_call import ModelCall
from .host.place import Place

LABEL = "HybridGuidance"
MOST_KEPT = 64


class GuidanceEffect:
    """Routes the text of prompts that speak to several people; keeps the regions between steps."""

    label = LABEL
    kind = "guidance"  # reads the prompts, so one is enough for all of them
    attention = "attn2"

    def __init__(self, sites: tuple[Site, ...]) -> None:
        self.sites = {site.key: site for site in sites}
        self._regions: dict[Any, Any] = {}

    def begin(self, call: ModelCall) -> Routing | None:
        """See `host.effect.Effect`."""
        if all(prompt.own(ROUTING_KEY) is None for prompt in call.prompts):
            return None
        return Routing(LABEL, self.sites, self)

    def rows(self, call: LayerCall, faces: tuple[Region, ...] | None = None) -> Rows:
        """See `host.layer_call.TextRouter`."""
        found = []
        call.require_grid("the people of a prompt", "guide one person")
        for chunk in call.chunks:
            routing: GuidanceRouting | None = chunk.prompt.own(ROUTING_KEY)
            if routing is None:
                continue
            if call.repeated:
                raise ValueError(
                    "another node repeats the rows of this layer for texts of its own, so guidance for several people "
                    "cannot be told apart. Remove it (attention couple), or guide one person"
                )
            place = call.place(chunk)
            found.append((chunk.rows, self._met(routing, place, call, faces)))
        return found

    def _met(
        self, routing: GuidanceRouting, place: Place, call: LayerCall, faces: tuple[Region, ...] | None
    ) -> tuple[Region, ...]:
        def make() -> tuple[Region, ...]:
            here = replace(routing, masks=place.masks(routing.masks))
            texts = guidance_regions(here, call.grid, place.elsewhere(routing.masks))
            met = texts if faces is None else intersect(faces, texts, call.num_tokens)
            return tuple(region.to(call.q.device) for region in met)

        return self._keep((routing, place, faces, call.grid, call.q.device), make)

    def _keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._regions:
            if len(self._regions) >= MOST_KEPT:
                self._regions.clear()
            self._regions[key] = make()
        return self._regions[key]


def patch_guidance(model: Any, routing: GuidanceRouting | None) -> Any:
    """A clone of the MODEL that honours `GuidanceRouting` in a CONDITIONING; unpatched when there is none to honour."""
    if routing is None:
        return model.clone()
    return installed(model, GuidanceEffect(discover_sites(model.model.diffusion_model)))
