"""Promise 8: attention couple repeats rows per region before the replace slot; every region's people must stay.

In band r of the picture, coupled and patched must equal patched alone with region r's text as the prompt.
"""

from __future__ import annotations

from typing import Any

import peer_ours
import peer_packs
import peer_standins
import pytest
import torch
from torch import Tensor

LAYOUT = "sd15_tiny"
SIZE = 24  # divisible by 2 and 3 bands
TOLERANCE = 1e-4


def _text(seed: int) -> Tensor:
    return torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(100 + seed))


def _conditioning(context: Tensor) -> list[list[Any]]:
    return [[context, {"pooled_output": torch.zeros(1, 768)}]]


def _bands(num: int) -> Tensor:
    """Horizontal bands as masks `[num, 1, H, W]`."""
    rows = torch.arange(SIZE * 8) * num // (SIZE * 8)
    return torch.stack([(rows == i).float()[None, :, None].expand(1, -1, SIZE * 8) for i in range(num)])


def _real_couple(host: Any, model: Any, contexts: list[Tensor]) -> Any:
    node, masks = peer_packs.load_couple_node(host)(), _bands(len(contexts) + 1)
    regions = {f"cond_{i}": _conditioning(c) for i, c in enumerate(contexts, start=1)}
    regions |= {f"mask_{i}": masks[i] for i in range(1, len(masks))}
    return node.attention_couple_simple(model, masks[0], **regions)[0]


@pytest.fixture(scope="module")
def scene(pack: Any, small_models: Any) -> peer_ours.Scene:
    return peer_ours.make_scene(pack, small_models, LAYOUT)


def _captured(scene: peer_ours.Scene, model: Any, positive: Any = None) -> Tensor:
    return peer_standins.capture_first_layer(model, scene.keys[0], positive or scene.positive, scene.negative, SIZE)


@pytest.mark.parametrize(("num", "real"), [(2, False), (3, False), (5, False), (2, True), (3, True)])
@pytest.mark.parametrize("ours_first", [False, True])
def test_every_region_keeps_its_people(
    pack: Any, scene: peer_ours.Scene, real: bool, num: int, ours_first: bool
) -> None:
    contexts = [_text(i) for i in range(1, num)]

    def couple(model: Any) -> Any:
        return _real_couple(pack.host, model, contexts) if real else peer_standins.couple(model, contexts)

    both = couple(scene.patched(scene.model)) if ours_first else scene.patched(couple(scene.model))
    got = _captured(scene, both)
    prompts = [scene.positive, *(_conditioning(c) for c in contexts)]
    alone = [_captured(scene, scene.patched(scene.model), prompt) for prompt in prompts]
    band = torch.arange(SIZE * SIZE) * num // (SIZE * SIZE)
    expected = sum(alone[i][:1] * (band == i)[None, :, None] for i in range(num))
    torch.testing.assert_close(got[:1], expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(got[1:], alone[0][1:], atol=TOLERANCE, rtol=TOLERANCE)
