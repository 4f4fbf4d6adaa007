"""Stored features on their way to the layers of one UNet call: while a layer computes, the next one's are copied."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from .cache import LayerFeatures
from .storage import StoredFeatures, StoredLayer

Arrival = Callable[[], Sequence[StoredLayer]]
"""Waits for a copy that was begun, and gives what arrived."""

_streams: dict[torch.device, torch.cuda.Stream] = {}


class Prefetch:
    """For one UNet call. order: the sites in the order in which the UNet comes to them.

    At most two layers are on the device at a time. A layer that is asked for out of order is copied then.
    """

    def __init__(
        self,
        references: Sequence[StoredFeatures],
        order: Sequence[str],
        device: torch.device,
        begin: Callable[[Sequence[StoredLayer], torch.device], Arrival] | None = None,
    ) -> None:
        self._references, self._device, self._begin = references, device, begin or begin_copy
        self._following = dict(itertools.pairwise(order))
        self._begun: dict[str, Arrival] = {}
        if order:
            self._fetch(order[0])

    def layers(self, path: str) -> tuple[LayerFeatures, ...]:
        """Every reference's features at one site, as the attention takes them."""
        self._fetch(path)
        arrival = self._begun.pop(path)
        if path in self._following:
            self._fetch(self._following[path])
        return tuple(layer.expanded() for layer in arrival())

    def _fetch(self, path: str) -> None:
        if path not in self._begun:
            self._begun[path] = self._begin([one.layers[path] for one in self._references], self._device)


def begin_copy(layers: Sequence[StoredLayer], device: torch.device) -> Arrival:
    """Begins to copy layers to a device; on a GPU beside whatever it computes."""
    if device.type != "cuda" or all(layer.device == device for layer in layers):
        there = [layer.to(device) for layer in layers]
        return lambda: there
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    stream = _streams[device]
    with torch.cuda.stream(stream):
        moved = [layer.to(device) for layer in layers]
    arrived = stream.record_event()

    def arrival() -> Sequence[StoredLayer]:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        for tensor in (tensor for layer in moved for tensor in layer.tensors):
            tensor.record_stream(computing)  # the memory is not given away before the layer is done with it
        return moved

    return arrival
