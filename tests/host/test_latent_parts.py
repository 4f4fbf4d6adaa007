"""Nodes that evaluate parts of the latent within a step, or stack tiles in one call, and do not say where they lie."""

from __future__ import annotations

from typing import Any

import fusion_lab
import pytest
import torch
from fusion_lab import FusionLab, halves, largest, record, relative
from torch import Tensor

LATENT = (8, 16)
PARTS = {"left": (8, 8, 0, 0), "right": (8, 8, 0, 8), "left of the middle": (8, 6, 0, 1)}


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, "sd15_tiny")


def x_of(seed: int = 4) -> Tensor:
    return fusion_lab.noise(1, LATENT, seed=seed) * fusion_lab.SIGMA


def people(lab: FusionLab, right: int) -> Any:
    """Person 3 in the left half, another in the right."""
    return lab.routed([lab.identity(3), lab.identity(right)], halves(64, 128), background="none")


def evaluating(model: Any, area: tuple[int, int, int, int]) -> Any:
    """A clone that evaluates the positive prompt once more in every step, on a part of the latent (as SWG does)."""
    import comfy.samplers

    height, width, y, x = area

    def after(args: dict[str, Any]) -> Tensor:
        part = args["input"][..., y : y + height, x : x + width]
        comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], part, args["sigma"], args["model_options"])
        return args["denoised"]

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(after)
    return clone


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_latent_shows_the_people_who_are_there(lab, part):
    """In the left half nothing depends on the right person, exactly; in the right half it does."""
    site, outs = lab.sites[0], []
    for right in (4, 5):
        model = evaluating(lab.patch(routed=people(lab, right))[0], PARTS[part])
        calls = record(model, site.key, "attn2", lambda m: lab.call(m, latent=x_of()))
        (call,) = [one for one in calls if one.options["activations_shape"][-1] == PARTS[part][1]]
        outs.append(call)
    difference = largest(outs[0].out - outs[1].out)
    assert difference > 1e-3 if part == "right" else difference == 0.0
    plain = record(evaluating(lab.model, PARTS[part]), site.key, "attn2", lambda m: lab.call(m, latent=x_of()))
    (call,) = [one for one in plain if one.options["activations_shape"][-1] == PARTS[part][1]]
    assert relative(outs[0].out, call.out) > 1e-3, "and somebody is there"


def test_a_part_that_lies_nowhere_in_the_latent_is_said_aloud(lab, caplog):
    import comfy.samplers

    def after(args: dict[str, Any]) -> Tensor:
        part = args["input"][..., :6].flip(-1)
        comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], part, args["sigma"], args["model_options"])
        return args["denoised"]

    model = lab.patch(routed=people(lab, 4))[0].clone()
    model.set_model_sampler_post_cfg_function(after)
    with caplog.at_level("WARNING", "fusedid"):
        lab.call(model, latent=x_of())
    assert sum("evaluates the picture in parts" in record.message for record in caplog.records) == 1


def in_tiles(model: Any, *, stacked: bool) -> Any:
    """A clone whose model sees two tiles of the latent: stacked in the batch, all prompts of one tile first (as Tiled
    Diffusion stacks them), or one after the other."""

    def wrapper(apply_model: Any, args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        tiles = x.chunk(2, dim=-1)
        if not stacked:
            return torch.cat([apply_model(tile, t, **c) for tile in tiles], -1)
        repeated = {name: v.repeat(2, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) else v for name, v in c.items()}
        return torch.cat(apply_model(torch.cat(tiles), t.repeat(2), **repeated).chunk(2), -1)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def test_stacked_tiles_are_what_they_are_one_after_the_other(lab):
    patched, _ = lab.patch()
    stacked, alone, plain = (
        lab.call(in_tiles(model, stacked=how), latent=x_of())
        for model, how in ((patched, True), (patched, False), (lab.model, True))
    )
    assert relative(stacked, alone) < 1e-5
    assert relative(stacked, plain) > 1e-3


@pytest.mark.parametrize("stacked", [True, False])
def test_people_stay_in_their_tiles(lab, stacked):
    a, b = (
        lab.call(in_tiles(lab.patch(routed=people(lab, right))[0], stacked=stacked), latent=x_of()) for right in (4, 5)
    )
    left, right = (a - b)[..., :8], (a - b)[..., 8:]
    assert largest(left) == 0.0 and largest(right) > 1e-3


def test_a_batch_in_tiles_keeps_its_pictures_apart(lab):
    """Two pictures, two prompts, two tiles: eight rows, of which four are positive."""
    latents = torch.cat([x_of(4), x_of(5)])
    patched, _ = lab.patch()
    together = lab.call(in_tiles(patched, stacked=True), latent=latents)
    for row in range(2):
        alone = lab.call(in_tiles(patched, stacked=False), latent=latents[row : row + 1])
        assert relative(together[row : row + 1], alone) < 1e-5


def test_pictures_of_a_batch_may_each_show_another_part(lab):
    """As nodes tell that sample several tiles at once: the first row is the left half, the second the right one."""
    views = ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0))
    x = fusion_lab.noise(2, (8, 8), seed=6) * fusion_lab.SIGMA
    site, outs = lab.sites[0], []
    for right in (4, 5):
        model = lab.patch(routed=people(lab, right))[0].clone()
        model.model_options["transformer_options"]["fusedid_view"] = views * 2  # both prompts' rows
        outs.append(record(model, site.key, "attn2", lambda m: lab.call(m, latent=x))[0])
    start = outs[0].options["cond_or_uncond"].index(0) * 2
    assert largest(outs[0].out[start] - outs[1].out[start]) == 0.0
    assert largest(outs[0].out[start + 1] - outs[1].out[start + 1]) > 1e-3
    recorder = lab.pack.nodes["FusedIDRecordAttention"]
    recorded, recording = recorder.execute(model, start_percent=0.0, end_percent=1.0).args
    lab.call(recorded, latent=x)
    assert all(float(share.max()) > 0 for _, share in recording.people()), "recordings take parts of one row"
    one = lab.patch(routed=people(lab, 4))[0].clone()
    one.model_options["transformer_options"]["fusedid_view"] = views[1]
    alone = record(one, site.key, "attn2", lambda m: lab.call(m, latent=x[1:]))[0]
    row = alone.options["cond_or_uncond"].index(0)
    assert relative(outs[0].out[start + 1], alone.out[row]) < 1e-5
