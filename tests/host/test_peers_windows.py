"""Context windows (the host's and AnimateDiff-Evolved's) run parts of a batch: every frame must still get its face.

Without a motion model frames are independent, so windows must change nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

import peer_ours
import peer_packs
import peer_standins
import pytest
import torch
from fusion_lab import relative

FRAMES, LENGTH, OVERLAP, SIZE = 5, 3, 1, 8
STEPS = FRAMES - 1  # the host's windows over a batch compare as many noise levels as there are frames


@pytest.fixture(scope="module")
def scene(pack: Any, small_models: Any) -> peer_ours.Scene:
    asyncio.run(pack.host.nodes.init_builtin_extra_nodes())
    return peer_ours.make_scene(pack, small_models, "sd15_tiny")


def _host_windows(host: Any, model: Any) -> Any:
    given = {"context_length": LENGTH, "context_overlap": OVERLAP, "model": model, "dim": 0}
    return peer_ours.run_node(host.node("ContextWindowsManual"), **given)[0]


def _evolved(host: Any, model: Any) -> Any:
    peer_packs.load_peer(host, "ComfyUI-AnimateDiff-Evolved")
    options = host.node("ADE_StandardStaticContextOptions")().create_options(LENGTH, OVERLAP)[0]
    return host.node("ADE_UseEvolvedSampling")().use_evolved_sampling(model, "use existing", context_options=options)[0]


@pytest.mark.parametrize("windows", [_host_windows, _evolved], ids=["host", "AnimateDiff-Evolved"])
@pytest.mark.parametrize("ours_first", [False, True])
def test_windows_change_nothing(pack: Any, scene: peer_ours.Scene, windows: Any, ours_first: bool) -> None:
    def run(model: Any) -> torch.Tensor:
        return peer_standins.sample(model, scene.positive, scene.negative, steps=STEPS, size=SIZE, batch=FRAMES)

    expected = run(scene.patched(scene.model))
    both = (
        windows(pack.host, scene.patched(scene.model)) if ours_first else scene.patched(windows(pack.host, scene.model))
    )
    assert relative(run(both), expected) < 1e-4
    assert relative(run(windows(pack.host, scene.model)), expected) > 1e-3
