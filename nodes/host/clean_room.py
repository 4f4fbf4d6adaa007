"""A pass of our own through the model while others sample with it: the host's UNet, hooks and LoRA acting, nobody else.

Other packs put modules into the UNet for as long as a run lasts (motion modules), and read the options of every call
(ControlNet references). So the modules leave for the time of the pass, and its options are complete.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .effect import Key
from .kernel import kernel_attention
from .owners import is_the_hosts

OVERRIDE = "optimized_attention_override"
"""Another pack's attention kernel, which the picture's own pass uses too."""
PART_PATCH = "forward_timestep_embed_patch"
"""The host's name of functions that run modules it does not know."""


@contextmanager
def clean_room(base: Any, options: Mapping[str, Any]) -> Iterator[nn.Module]:
    """The UNet of a loaded model (the host's BaseModel) by itself. options: of the call in which we are.

    A compiled UNet is given as it was before: it would be compiled once more for this single pass.
    """
    unet = getattr(base.diffusion_model, "_orig_mod", base.diffusion_model)
    patcher = getattr(base, "current_patcher", None)
    foreign = tuple(kind for kind, _ in options.get("patches", {}).get(PART_PATCH, ()) if not is_the_hosts(kind))
    if patcher is None:
        yield from _without(unet, foreign)
        return
    with patcher.use_ejected():
        yield from _without(unet, foreign)


def call_options(options: Mapping[str, Any], sigma: Tensor, **patches: Any) -> dict[str, Any]:
    """Options for a UNet call of one row: what the host always gives, and our own patches. sigma: noise level `[1]`."""
    ours = {"cond_or_uncond": [0], "uuids": [uuid.uuid4()], "sigmas": sigma, **patches}
    return ours | {name: options[name] for name in ("sample_sigmas", OVERRIDE) if name in options}


def note_cross_attention(note: Callable[[Key, Tensor], None]) -> dict[str, Any]:
    """Patches for `call_options`: `note` gets every cross-attention's input `[1, N, C]` behind its norm."""

    def patch(n: Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple[Tensor, Any, Any]:
        note((*extra["block"], extra["block_index"]), n)
        return n, context, value

    return {"patches": {"attn2_patch": [patch]}}


def note_self_attention(keys: Iterable[Key], note: Callable[[Key, Tensor, Tensor, Tensor], None]) -> dict[str, Any]:
    """As `note_cross_attention`: `note` gets queries, keys and values `[1, N, C]` of the self-attention of blocks."""

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        note((*extra["block"], extra["block_index"]), q, k, v)
        return kernel_attention(q, k, v, extra["n_heads"], extra)

    return {"patches_replace": {"attn1": dict.fromkeys(keys, replacement)}}


def _without(unet: nn.Module, kinds: tuple[type, ...]) -> Iterator[nn.Module]:
    """The UNet without modules of these classes, which only another pack's function can run."""
    taken: list[tuple[nn.Module, dict[str, Any]]] = []
    if kinds:
        for part in unet.modules():
            if any(isinstance(child, kinds) for child in part._modules.values()):
                taken.append((part, part._modules.copy()))
    try:
        for part, children in taken:
            part._modules.clear()
            part._modules.update({name: child for name, child in children.items() if not isinstance(child, kinds)})
        yield unet
    finally:
        for part, children in taken:
            part._modules.clear()
            part._modules.update(children)
