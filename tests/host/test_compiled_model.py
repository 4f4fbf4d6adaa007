"""torch.compile'd models: the same picture, and no graph that is made anew at every step."""

from __future__ import annotations

from typing import Any

import fusion_lab
import pytest
import torch
from fusion_lab import FusionLab, relative


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sd15_tiny")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The host's own wrapper around torch.compile with an eager backend that counts its graphs."""
    from comfy.ldm.modules import attention
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # The host's CPU kernel reads the free memory, so that it is compiled anew whenever that changes.
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph

    def apply(model: Any) -> Any:
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend=backend)
        return clone

    yield apply, graphs
    torch.compiler.reset()


@pytest.mark.parametrize(("first", "inputs"), [
    ("compile", {}),
    ("patch", {"adapter": "training-free", "reference_size": 64}),
], ids=["compiled before, adapter", "compiled after, training-free"])  # fmt: skip
def test_a_compiled_model_gives_the_same_picture(lab, compiled, first, inputs):
    apply, graphs = compiled
    wanted = lab.sample(lab.patch(**inputs)[0], steps=2)
    model = apply(lab.patch(**inputs)[0]) if first == "patch" else lab.patch(apply(lab.model), **inputs)[0]
    assert relative(lab.sample(model, steps=2), wanted) < 1e-4
    assert graphs, "something was compiled"
    lab.sample(model, steps=2, seed=8)  # the host's own code is made general when it runs again
    count = len(graphs)
    lab.sample(model, steps=2, seed=9)
    assert len(graphs) == count, "further runs compile nothing"


def test_routed_people_in_a_compiled_model(lab, compiled):
    apply, _ = compiled
    routed = lab.routed([lab.identity(3), lab.identity(4)], fusion_lab.halves(gap=8))
    patched, _ = lab.patch(routed=routed)
    assert relative(lab.sample(apply(patched), steps=2), lab.sample(patched, steps=2)) < 1e-4
