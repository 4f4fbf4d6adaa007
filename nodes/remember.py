"""A small memory for results of a model: several nodes that ask the same thing cause one computation."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor

Result = TypeVar("Result")


class Remembered(Generic[Result]):
    """The last `most` results. Owners (models) are held weakly: forgetting a model forgets its results."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, tuple[weakref.ref[Any], Result]] = OrderedDict()

    def get(self, owner: Any, key: Hashable, compute: Callable[[], Result]) -> Result:
        """The result of `owner` for `key`, computed when it is not among the kept ones."""
        full = (id(owner), key)
        kept = self._kept.get(full)
        if kept is None or kept[0]() is not owner:  # an id is reused once its object is gone
            kept = self._kept[full] = (weakref.ref(owner), compute())
        self._kept.move_to_end(full)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return kept[1]


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's shape and content."""
    content = tensor.detach().contiguous().cpu()
    return hashlib.sha256(repr(tuple(content.shape)).encode() + content.numpy().tobytes()).hexdigest()
