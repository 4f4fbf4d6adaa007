"""The reference pass while other packs sample with the same UNet: nothing of theirs is in it (METHOD 1.2)."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_lab import FusionLab, relative
from torch import Tensor, nn

FRAMES = 4
ADAPTERS = {"adapter": {}, "training-free": {"adapter": "training-free", "reference_size": 64, "timestep": "clean"}}


class Temporal(nn.Module):
    """Mixes the frames of a clip, and can do nothing with another number of rows (as motion modules)."""

    def forward(self, x: Tensor) -> Tensor:
        frames = x.unflatten(0, (-1, FRAMES))
        return (frames + 0.3 * frames.roll(1, 1)).flatten(0, 1)


def run_temporal(layer: Temporal, x: Tensor, *_: Any) -> Tensor:
    return layer(x)


@pytest.fixture
def lab(pack: Any, small_models: Any) -> Iterator[FusionLab]:
    lab = FusionLab(pack, small_models, "sd15_tiny")
    cache(lab).drop(lambda _: True)
    yield lab
    del lab
    gc.collect()


def cache(lab: FusionLab) -> Any:
    return lab.pack.submodule("nodes.reference_cache").CACHE


def features(lab: FusionLab, model: Any, **sampled: Any) -> Any:
    """What the reference pass of a run keeps, beginning with an empty cache."""
    cache(lab).drop(lambda _: True)
    lab.sample(model, steps=1, latent=torch.zeros(FRAMES, 4, 8, 8), **sampled)
    (entry,) = cache(lab)._entries.values()
    return entry


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for path in a.layers for x, y in zip(a.layers[path].tensors, b.layers[path].tensors))


def with_motion(lab: FusionLab, model: Any, *, registered: bool) -> Any:
    """A clone with a temporal module behind the first block: by the host's injections, or put there by hand."""
    from comfy.patcher_extension import PatcherInjection

    clone, block, module = model.clone(), lab.unet.input_blocks[1], Temporal()
    clone.set_model_forward_timestep_embed_patch((Temporal, run_temporal))
    if registered:
        inject, eject = (lambda _: block.append(module)), (lambda _: block.__delitem__(-1))
        clone.set_injections("motion", [PatcherInjection(inject, eject)])
    else:
        block.append(module)
    return clone


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("registered", [True, False])
def test_injected_modules_leave_for_the_pass_and_come_back(lab, adapter, registered):
    patched, _ = lab.patch(**ADAPTERS[adapter])
    wanted = features(lab, patched)
    children = list(lab.unet.input_blocks[1])
    moving = with_motion(lab, patched, registered=registered)
    try:
        assert same(features(lab, moving), wanted)
        here, still = (lab.sample(m, latent=torch.zeros(FRAMES, 4, 8, 8), steps=1) for m in (moving, patched))
        if registered:
            assert relative(here, still) > 1e-3, "in the picture's own pass the module acts"
            assert list(lab.unet.input_blocks[1]) == children, "the host has ejected it"
        else:
            assert list(lab.unet.input_blocks[1])[:-1] == children, "it is where its owner put it"
    finally:
        if not registered:
            del lab.unet.input_blocks[1][-1]


def test_injected_modules_come_back_when_the_pass_fails(lab, monkeypatch):
    moving = with_motion(lab, lab.patch()[0], registered=True)
    reference = lab.pack.submodule("nodes.reference")
    inside: list[int] = []

    def failing(*_: Any) -> None:
        inside.append(len(lab.unet.input_blocks[1]))
        raise RuntimeError("a GPU fell off")

    seen: list[bool] = []
    original = type(moving).inject_model

    def noting(self: Any) -> None:
        original(self)
        seen.append(self.is_injected)

    monkeypatch.setattr(reference, "_pass", failing)
    monkeypatch.setattr(type(moving), "inject_model", noting)
    count = len(lab.unet.input_blocks[1])
    with pytest.raises(RuntimeError, match="fell off"):
        lab.sample(moving, latent=torch.zeros(FRAMES, 4, 8, 8))
    assert inside == [count] and seen[-1], "ejected inside, injected again after the error"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_patches_of_other_packs_do_not_act_in_the_pass(lab, adapter):
    """FreeU, token patches, replaced layers, embeddings: in the picture they act, in the reference not."""
    patched, _ = lab.patch(**ADAPTERS[adapter])
    wanted = features(lab, patched)
    busy = patched.clone()
    busy.set_model_attn1_patch(lambda n, c, v, extra: (n * 0.5, c, v))
    busy.set_model_attn1_output_patch(lambda n, extra: n * 0.9)
    busy.set_model_attn2_patch(lambda n, c, v, extra: (n * 0.5, c, v))
    busy.set_model_attn2_output_patch(lambda n, extra: n * 0.9)
    busy.set_model_input_block_patch(lambda h, options: h * 1.1)
    busy.set_model_output_block_patch(lambda h, skip, options: (h * 1.1, skip))
    busy.set_model_attn2_replace(lambda q, k, v, extra: q * 0.1, *lab.sites[0].key)
    assert same(features(lab, busy), wanted)
    latent = torch.zeros(FRAMES, 4, 8, 8)
    assert relative(lab.sample(busy, steps=1, latent=latent), lab.sample(patched, steps=1, latent=latent)) > 1e-3


def test_blocks_that_read_every_call_find_what_the_host_always_gives(lab):
    """ControlNet references replace the blocks' forward and read the options of each call."""
    patched, _ = lab.patch()
    wanted = features(lab, patched)
    block = lab.unet.get_submodule(lab.sites[0].path)
    original, calls = type(block).forward, []

    def reading(x: Tensor, context: Any = None, transformer_options: Any = None) -> Tensor:
        options = transformer_options
        assert len(options["uuids"]) == len(options["cond_or_uncond"]) > 0 and options["sigmas"].numel() > 0
        calls.append((len(x), tuple(options["uuids"])))
        return original(block, x, context=context, transformer_options=options)

    block.forward = reading
    try:
        assert same(features(lab, patched), wanted)
    finally:
        del block.forward
    (rows, (uuid,)) = calls[0]
    assert rows == 1 and all(uuid not in uuids for _, uuids in calls[1:]), "a prompt of nobody's"


@pytest.mark.parametrize("timestep", ["clean", "matched"])
def test_the_pass_draws_nothing_from_the_hosts_generators(lab, timestep):
    patched, _ = lab.patch(timestep=timestep)
    states = []

    def note(model: Any) -> None:
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(lambda args: states.append(torch.get_rng_state()) or args["denoised"])
        cache(lab).drop(lambda _: True)
        torch.manual_seed(3)
        lab.sample(clone, steps=2)

    note(patched)
    note(lab.model)
    assert all(torch.equal(a, b) for a, b in zip(states[:2], states[2:], strict=True))


def test_the_interpreter_exits_without_a_word(pack, small_models, comfyui_checkout, tmp_path):
    """Models, features and patches of a run are still there when Python leaves."""
    script = tmp_path / "leave.py"
    here = Path(__file__).resolve()
    script.write_text(
        "import sys; from pathlib import Path\n"
        f"sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[2])!r}]\n"
        "import cpu_torch; cpu_torch.install()\n"
        "import comfy_host, small_models, fusion_lab\n"
        f"base = comfy_host.make_base(Path({str(tmp_path / 'base')!r}))\n"
        f"host = comfy_host.import_host(Path({str(comfyui_checkout)!r}), base)\n"
        f"pack = comfy_host.load_pack(host, Path({str(here.parents[2])!r}))\n"
        "lab = fusion_lab.FusionLab(pack, small_models.SmallModels(base / 'models'), 'sd15_tiny')\n"
        "people = lab.routed([lab.identity(0), lab.identity(1)], fusion_lab.halves(), separation=4.0)\n"
        "free = {'adapter': 'training-free', 'reference_size': 64}\n"
        "for given in ({}, free, {'routed': people, 'cache_device': 'cpu'}):\n"
        "    model = lab.patch(**given)[0]\n"
        "    lab.sample(model, steps=1)\n"
        "sys.stderr.write('LEAVING')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    before, _, after = done.stderr.rpartition("LEAVING")
    assert done.returncode == 0, before[-2000:]
    assert after.strip() == ""
