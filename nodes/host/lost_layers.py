"""Notices, in the first call of every run, layers that ran without us (promise 4).

A layer's query projection runs whoever computes the rest of the layer, so a layer that ran and did not ask our slot was
taken by somebody. One that did not run was skipped (DeepCache and the like do), and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...attention.sites import Site
from .effect import Acts, Key
from .messages import named_error
from .owners import is_the_hosts, owner_of
from .slot import Slot


@contextmanager
def watched(acts: Acts) -> Iterator[None]:
    """Around a call of the model. Raises ValueError that names who took a layer."""
    if not _is_first(acts):
        yield
        return
    unet, ran = acts.call.base.diffusion_model, set()
    handles = []
    if not hasattr(unet, "_orig_mod"):  # hooks would compile the UNet once more
        for (attention, key), site in acts.sites().items():
            projection = unet.get_submodule(f"{site.path}.{attention}.to_q")
            handles.append(projection.register_forward_pre_hook(_noting(ran, (attention, key))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    lost = {place: site for place, site in acts.sites().items() if place in ran and place not in acts.acted}
    if lost:
        raise named_error(_message(acts, lost, unet))


def _noting(ran: set[tuple[str, Key]], place: tuple[str, Key]) -> Any:
    return lambda *_: ran.add(place)


def _is_first(acts: Acts) -> bool:
    """Of its run, with this cast: effects may begin and end at different steps."""
    sampling = acts.call.sampling
    if sampling is None:
        return False
    cast = frozenset(acts.sites())
    fresh: list[bool] = []
    sampling.keep(("watched", acts.call.base, cast), lambda: fresh.append(True))
    return bool(fresh)


def _message(acts: Acts, lost: Mapping[tuple[str, Key], Site], unet: Any) -> str:
    labels = ", ".join(dict.fromkeys(one.label for place in lost for one in acts.at(*place))) or "FusedID"
    takers = list(dict.fromkeys(_taker(acts, place, site, unet) for place, site in lost.items()))
    total = len(acts.sites())
    return (
        f"{labels}: only {total - len(lost)} of {total} layers act; {len(lost)} were taken by {', '.join(takers)}. "
        "Remove that node, or leave those layers to it with 'layers'"
    )


def _taker(acts: Acts, place: tuple[str, Key], site: Site, unet: Any) -> str:
    attention, key = place
    layers = acts.replaced.get(attention, {})
    there = layers.get(key, layers.get(key[:2]))
    if there is not None and not isinstance(there, Slot):
        return owner_of(there)
    block = unet.get_submodule(site.path)
    for module in (block, getattr(block, attention)):
        forward = vars(module).get("forward", type(module).forward)
        if not is_the_hosts(forward):
            return owner_of(forward)
    return "another node that runs them past ComfyUI's patches"
