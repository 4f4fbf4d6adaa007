"""Which part of the picture is sampled, told through the CONDITIONING.

Nodes that sample a picture in parts (tiles, crops around faces) give the model a part and do not say which. But they
cut what the CONDITIONING holds for the whole picture: some the hints of ControlNets, some the masks. So it carries
both. The hints are rulers, whose numbers say where they were cut; a cut mask is a view of the mask's memory, and its
address says where. Neither changes anything else: rulers add nothing to the model, and the mask is all ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.controlnet import ControlBase
from torch import Tensor

from ...attention.grid import LATENT_SCALE, View
from ...attention.ruler import ruler, span_on_ruler
from .messages import show_on_running_node
from .place import VIEW

PLACE = "fusedid_place"
"""Where a part of a prompt holds its `ToldPlace`."""
SPANS = "fusedid_spans"
"""Where a call's transformer_options hold what rulers say: by axis one span per row of the batch."""
ROWS, COLUMNS = "rows", "columns"
WHOLE: View = (0.0, 0.0, 1.0, 1.0)
FINEST, MOST_NUMBERS = 4, 16384

Span = tuple[float, float]
Conditioning = Sequence[Sequence[Any]]
"""The host's `[[text, values], ...]`."""


@dataclass(frozen=True, eq=False)
class ToldPlace:
    """view: the part of the picture, where that is known. Else mask `[B, H, W]`: what nodes cut parts out of; ours: it
    was made for that alone. picture_hw: the whole picture's size in pixels.
    """

    view: View | None = None
    mask: Tensor | None = None
    ours: bool = False
    picture_hw: tuple[int, int] | None = None

    def cut(self, values: Mapping[str, Any]) -> View | None:
        """What the mask in a prompt's part shows of ours; None where it is no part of our mask's memory."""
        mask = values.get("mask")
        return None if self.mask is None or not isinstance(mask, Tensor) else _part_of(mask, self.mask)


class Ruler(ControlBase):
    """A ControlNet that adds nothing. Its hint numbers the picture's rows or columns.

    numbers: `[1, 1, H, W]`, the same along the other axis, where it takes no memory.
    """

    def __init__(self, axis: str, numbers: Tensor) -> None:
        super().__init__()
        self.axis, self.numbers, self.cond_hint_original = axis, numbers, numbers
        # Nodes that cut inside the model resize hints to the latent times this, in this type.
        self.compression_ratio, self.manual_cast_dtype = 1, torch.float32
        self._read: tuple[Any, list[Span | None]] = (None, [])

    @property
    def hint(self) -> Tensor:
        """What others made of the numbers; `numbers` itself where nobody cut them."""
        return self.cond_hint_original if self.cond_hint is None else self.cond_hint

    def spans(self) -> list[Span | None]:
        """The part of the axis that each picture of the hint shows; None where it cannot be read."""
        hint = self.hint
        if self._read[0] is not hint:  # once, not at every step: it may lie on a GPU
            along, size = (hint[:, 0, :, 0], -2) if self.axis == ROWS else (hint[:, 0, 0, :], -1)
            self._read = hint, [span_on_ruler(one, self.numbers.shape[size]) for one in along.detach().cpu()]
        return self._read[1]

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, transformer_options: Any) -> Any:
        """The previous ControlNet's result. The call's options get what part of the picture it shows."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self.hint is not self.numbers:
            spans = _per_row(self.spans(), len(x_noisy), batched_number)
            transformer_options[SPANS] = {**transformer_options.get(SPANS, {}), self.axis: spans}
            _note_spans(transformer_options)
        return previous

    def copy(self) -> Ruler:
        """The same before no ControlNet, as the host's ControlNets copy themselves."""
        copied = Ruler(self.axis, self.numbers)
        self.copy_to(copied)
        return copied

    def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> Ruler:
        """The same for another device."""
        cloned = self.copy()
        if autoregister:
            self.multigpu_clones[load_device] = cloned
        return cloned


class Rulers:
    """The rulers of one picture: one pair per ControlNet behind them, so that prompts that share one still do."""

    def __init__(self, picture_hw: tuple[int, int]) -> None:
        height, width = picture_hw
        # Finer than pixels: nodes that enlarge a picture themselves cut between its pixels.
        fine = max(1, min(FINEST, MOST_NUMBERS // max(picture_hw)))
        shape = (1, 1, height * fine, width * fine)
        self._numbers = {
            ROWS: ruler(shape[2])[:, None].expand(shape),
            COLUMNS: ruler(shape[3])[None, :].expand(shape),
        }
        self._made: dict[int, Ruler] = {}

    def before(self, control: Any) -> Ruler:
        """Both rulers with a ControlNet (or None) behind them."""
        if id(control) not in self._made:
            inner, outer = (Ruler(axis, self._numbers[axis]) for axis in (ROWS, COLUMNS))
            self._made[id(control)] = outer.set_previous_controlnet(inner.set_previous_controlnet(control))
        return self._made[id(control)]


def tell_view(prompt: Conditioning, view: View) -> list[list[Any]]:
    """A prompt for a latent that shows a known part of the picture."""
    return [[text, {**values, PLACE: ToldPlace(view=view)}] for text, values in prompt]


def tell_by_cutting(
    positive: Conditioning, negative: Conditioning, picture_hw: tuple[int, int]
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Prompts for nodes that sample a picture (its size in pixels) in parts and cut hints or masks on the way."""
    rulers, ones = Rulers(picture_hw), torch.ones(1, *picture_hw)
    controls = [values.get("control") for _, values in positive]
    # Without ControlNets one ruler for both: nodes that cut copy it per prompt, and the host computes prompts with
    # different ControlNets one by one. It lends the positive's to negative prompts for the whole picture.
    lend = all(one is None for one in controls) and any("area" not in values for _, values in negative)
    lent = lend or any(values.get("control_apply_to_uncond") for _, values in positive)

    def told(values: Mapping[str, Any], *, with_ruler: bool) -> dict[str, Any]:
        changed = dict(values)
        if with_ruler:
            changed["control"] = rulers.before(values.get("control"))
        mask, ours = values.get("mask"), False
        if mask is None and "area" not in values:  # the host blends areas with a mask otherwise than without
            mask, ours = ones, True
        if mask is not None:
            changed["mask"] = mask = (mask[None] if mask.ndim == 2 else mask).contiguous()
        return {**changed, PLACE: ToldPlace(mask=mask, ours=ours, picture_hw=picture_hw)}

    told_positive = [[text, told(values, with_ruler=True)] for text, values in positive]
    for _, values in told_positive:
        if lend:
            values["control_apply_to_uncond"] = True
    told_negative = [
        [text, told(values, with_ruler=not lent or values.get("control") is not None)] for text, values in negative
    ]
    return told_positive, told_negative


def note_view(executor: Any, *given: Any, **named: Any) -> Any:
    """An OUTER_SAMPLE wrapper: the run's options get the view that its prompts tell. What rulers say comes later.

    Raises ValueError when prompts tell different places: they are sampled in one latent.
    """
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    view = _told_view(list(_parts(guider.conds)), tuple(given[0].shape[-2:]))
    if view is None:
        return executor(*given, **named)
    options[VIEW] = view
    try:
        return executor(*given, **named)
    finally:
        options.pop(VIEW, None)


def _told_view(parts: Sequence[dict[str, Any]], latent_hw: tuple[int, ...]) -> View | None:
    told = [(values, values[PLACE]) for values in parts if PLACE in values]
    views: set[View] = set()
    pictures = set()
    for values, place in told:
        cut = place.cut(values)
        if place.ours and cut is not None:
            del values["mask"]  # it has told what it had to
        if place.view is not None:
            views.add(place.view)
        elif cut is not None and cut != WHOLE:
            views.add(cut)
        elif place.picture_hw is not None:
            pictures.add(place.picture_hw)
    if len(views) > 1:
        raise ValueError(
            f"the prompts are told to show different parts of the picture: {', '.join(map(str, sorted(views)))}. "
            "Connect positive and negative of one FusedIDPlaceInPicture"
        )
    if views:
        return views.pop()
    if not any(ruler.hint is not ruler.numbers for values in parts for ruler in _rulers(values)):
        _warn_of_unknown_cuts(pictures, latent_hw)
    return None


def _warn_of_unknown_cuts(pictures: set[tuple[int, int]], latent_hw: tuple[int, ...]) -> None:
    sizes = {tuple(round(side / LATENT_SCALE) for side in size) for size in pictures}
    if sizes and all(max(abs(a - b) for a, b in zip(size, latent_hw)) > 1 for size in sizes):
        height, width = next(iter(pictures))
        show_on_running_node(
            f"{latent_hw[1] * LATENT_SCALE} x {latent_hw[0] * LATENT_SCALE} pixels are sampled, the picture of "
            f"FusedIDPlaceInPicture is {width} x {height}, and this node does not tell which part of it that is. "
            "People's regions are laid over the part as over the whole picture, so they may get each other's face. Use "
            "FusedIDCutPicture, or a node that cuts the hints of ControlNets or the masks of prompts"
        )


def _parts(named: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for conds in named.values():
        yield from conds or ()


def _rulers(values: Mapping[str, Any]) -> Iterator[Ruler]:
    control = values.get("control")
    while control is not None:
        if isinstance(control, Ruler):
            yield control
        control = control.previous_controlnet


def _part_of(cut: Tensor, mask: Tensor) -> View | None:
    """Which part of a contiguous mask `[..., H, W]` another tensor is a view of; None where it has other memory."""
    height, width = mask.shape[-2:]
    if cut.dtype != mask.dtype or cut.device != mask.device or cut.ndim < 2 or cut.stride()[-2:] != (width, 1):
        return None
    start = (cut.data_ptr() - mask.data_ptr()) // mask.element_size()
    if not 0 <= start < mask.numel() or 0 in cut.shape:
        return None
    top, left = divmod(start % (height * width), width)
    bottom, right = top + cut.shape[-2], left + cut.shape[-1]
    if bottom > height or right > width:
        return None
    return top / height, left / width, bottom / height, right / width


def _per_row(spans: Sequence[Span | None], rows: int, chunks: int) -> list[Span | None]:
    """One span per row of a call: hints hold one for all, one per latent, or one per row."""
    if len(spans) == rows:
        return list(spans)
    latents = list(itertools.islice(itertools.cycle(spans), rows // chunks))
    return latents * chunks


def _note_spans(options: dict[str, Any]) -> None:
    spans = options[SPANS]
    rows, columns = spans.get(ROWS), spans.get(COLUMNS)
    if rows is None or columns is None or len(rows) != len(columns):  # the other axis follows
        return
    views = [None if r is None or c is None else (r[0], c[0], r[1], c[1]) for r, c in zip(rows, columns)]
    if None in views:
        _say_unreadable()
        views = [WHOLE]
    if len(set(views)) > 1:
        options[VIEW] = tuple(views)
    elif views[0] == WHOLE:
        options.pop(VIEW, None)
    else:
        options[VIEW] = views[0]


_said: set[str] = set()


def _say_unreadable() -> None:
    from comfy_execution.utils import get_executing_context

    run = str(get_executing_context())
    if run in _said:
        return
    _said.clear()
    _said.add(run)
    show_on_running_node(
        "this node changes the hints of ControlNets in a way that does not tell which part of the picture it samples. "
        "People's regions are laid over the part as over the whole picture"
    )
