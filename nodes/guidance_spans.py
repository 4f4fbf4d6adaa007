"""Which rows of a model call carry routed guidance, and which text keys their queries see.

A CONDITIONING entry for several people carries its `GuidanceRouting`. The host gives every entry a uuid and names the
uuids of a batch's chunks to each attention layer, so rows are found by what they are, not by where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..attention.grid import crop_masks
from ..attention.guidance_routing import GuidanceRouting, guidance_regions, intersect
from ..attention.routing import Region
from .guidance_conditioning import ROUTING_KEY

MOST_KEPT = 64


class GuidanceSpans:
    """Routings of the model call in progress, and their regions per token grid. Shared by all clones of a MODEL."""

    def __init__(self) -> None:
        self._routings: dict[Any, GuidanceRouting] = {}
        self._kept: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> GuidanceSpans:
        return self

    def note(self, conds: Iterable[Sequence[Mapping[str, Any]] | None], latent_hw: tuple[int, int]) -> None:
        """Reads the conds of one step (the host's dicts). latent_hw: size of the whole latent."""
        self._routings = {
            cond["uuid"]: self._for_area(cond[ROUTING_KEY], cond.get("area"), latent_hw)
            for group in conds
            for cond in group or ()
            if ROUTING_KEY in cond
        }

    def chunks(self, options: Mapping[str, Any]) -> tuple[GuidanceRouting | None, ...]:
        """For every chunk of the batch its routing, or None. Empty when no chunk is routed."""
        found = tuple(self._routings.get(uuid) for uuid in options.get("uuids", ()))
        return found if any(routing is not None for routing in found) else ()

    def rows(
        self,
        options: Mapping[str, Any],
        num_rows: int,
        num_queries: int,
        device: Any,
        faces: tuple[Region, ...] | None = None,
    ) -> list[tuple[slice, tuple[Region, ...]]]:
        """The routed rows of one layer's call with their regions; empty when nothing is routed.

        options: the host's extra_options. faces: regions by face to be met by the text spans. Raises ValueError when
        the rows cannot be told apart, because a prompt for several people would otherwise reach everybody.
        """
        chunks = self.chunks(options)
        if not chunks:
            return []
        batch, _, h, w = options["activations_shape"]
        if num_rows != batch or batch % len(chunks) or h * w != num_queries:
            raise ValueError(
                f"guidance for several people meets {num_rows} rows of {num_queries} queries where the model has "
                f"{batch} of {h} x {w}: another node repeats or merges tokens in this layer. Remove it (attention "
                "couple, ToMe, HyperTile), or guide one person"
            )
        each = batch // len(chunks)
        return [
            (slice(i * each, (i + 1) * each), self._regions(routing, (h, w), device, faces))
            for i, routing in enumerate(chunks)
            if routing is not None
        ]

    def _regions(
        self, routing: GuidanceRouting, grid_hw: tuple[int, int], device: Any, faces: tuple[Region, ...] | None
    ) -> tuple[Region, ...]:
        """Regions of one layer, kept between steps."""

        def make() -> tuple[Region, ...]:
            texts = guidance_regions(routing, grid_hw)
            met = texts if faces is None else intersect(faces, texts, grid_hw[0] * grid_hw[1])
            return tuple(region.to(device) for region in met)

        return self._keep((routing, faces), (*grid_hw, str(device)), make)

    def _for_area(self, routing: GuidanceRouting, area: Any, latent_hw: tuple[int, int]) -> GuidanceRouting:
        if area is None or len(area) != 4:
            return routing
        height, width, y, x = (int(n) for n in area)
        make = lambda: replace(routing, masks=crop_masks(routing.masks, latent_hw, (height, width, y, x)))  # noqa: E731
        return self._keep((routing,), ("area", height, width, y, x, *latent_hw), make)

    def _keep(self, owners: tuple[Any, ...], what: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """`make()`, remembered; holding the owners keeps their ids from being given to others."""
        key = (*map(id, owners), *what)
        if key not in self._kept:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[key] = (owners, make())
        return self._kept[key][1]
