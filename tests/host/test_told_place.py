"""FusedIDPlaceInPicture: nodes that sample a picture in parts tell which one, and nothing else changes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import peer_ours
import pytest
import torch
from fusion_lab import noise
from tile_standins import CutsInside, cut_hints, cut_masks
from torch import Tensor

from attention.grid import view_masks

PICTURE = (64, 96)
REGIONS = [(0, 0, 32, 32), (0, 31, 32, 63), (32, 64, 64, 96), (31, 1, 63, 33), (0, 0, 64, 96), (8, 24, 40, 88)]


class Lab:
    """A plain MODEL with prompts; what every call of it was told."""

    def __init__(self, pack: Any, small_models: Any) -> None:
        self.pack, self.models = pack, small_models
        self.told = pack.submodule("nodes.host.told_place")
        self.model = small_models.load_unet("sd15_tiny")
        self.positive = small_models.conditioning("sd15_tiny", seed=1)
        self.negative = small_models.conditioning("sd15_tiny", seed=2)

    def place(self, positive: Any = None, negative: Any = None, **given: Any) -> tuple[Any, Any]:
        """FusedIDPlaceInPicture on prompts (default: the plain ones) and a picture."""
        node, prompts = self.pack.nodes["FusedIDPlaceInPicture"], (positive or self.positive, negative or self.negative)
        if "place" not in given:
            given.setdefault("image", torch.zeros(1, *PICTURE, 3))
        return peer_ours.run_node(node, positive=prompts[0], negative=prompts[1], **given)

    def control(self, positive: Any, negative: Any) -> tuple[Any, Any]:
        """Both prompts behind a small ControlNet."""
        import nodes

        (net,) = nodes.ControlNetLoader().load_controlnet(self.models.controlnet("sd15_tiny").name)
        hint = torch.rand(1, *PICTURE, 3, generator=torch.Generator().manual_seed(4))
        return nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, net, hint, 1.0, 0.0, 1.0)

    def sample(
        self, positive: Any, negative: Any, hw: tuple[int, int] = (4, 4), *, model: Any = None, batch: int = 1
    ) -> tuple[Tensor, list[Any]]:
        """Two steps; the samples, and per call of the model (cond_or_uncond, view)."""
        import comfy.patcher_extension as extension

        calls = []

        def note(executor: Any, *given: Any, **named: Any) -> Any:
            options = named.get("transformer_options", given[5] if len(given) > 5 else {})
            calls.append((options["cond_or_uncond"], options.get(self.told.VIEW)))
            return executor(*given, **named)

        watched = (model or self.model).clone()
        watched.add_wrapper_with_key(extension.WrappersMP.OUTER_SAMPLE, "place", self.told.note_view)
        watched.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "note", note)
        return self.run(watched, positive, negative, hw, batch=batch), calls

    def run(self, model: Any, positive: Any, negative: Any, hw: tuple[int, int] = (4, 4), *, batch: int = 1) -> Tensor:
        """Samples of the host's KSampler node on a MODEL as it is."""
        import nodes

        latent = {"samples": noise(batch, hw, seed=3)}
        sampled = nodes.KSampler().sample(model, 7, 2, 4.0, "euler", "normal", positive, negative, latent, denoise=0.7)
        return sampled[0]["samples"]

    def views(self, *given: Any, **named: Any) -> set[Any]:
        """The views that the calls of a sampling were told."""
        _, calls = self.sample(*given, **named)
        assert calls
        return {view for _, view in calls}


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> Lab:
    return Lab(pack, small_models)


def view_of(region: tuple[int, ...], size: tuple[int, int] = PICTURE) -> tuple[float, ...] | None:
    top, left, bottom, right = region
    view = top / size[0], left / size[1], bottom / size[0], right / size[1]
    return None if view == (0.0, 0.0, 1.0, 1.0) else view


def near(found: Any, wanted: Any, pixels: float) -> bool:
    sizes = (*PICTURE, *PICTURE)
    return found is not None and all(abs(a - b) * side <= pixels for a, b, side in zip(found, wanted, sizes))


@pytest.mark.parametrize("region", REGIONS)
def test_cut_hints_tell_the_part_to_the_pixel(lab: Lab, region: tuple[int, ...]) -> None:
    prompts = lab.place()
    for tile_hw in ((32, 32), (32, 64), (64, 64)):
        cut = [cut_hints(prompt, region, PICTURE, tile_hw) for prompt in prompts]
        (found,) = lab.views(*cut, hw=(tile_hw[0] // 8, tile_hw[1] // 8))
        assert found == view_of(region) or near(found, view_of(region), 0.25)
        if tile_hw == (region[2] - region[0], region[3] - region[1]):
            assert found == view_of(region)


@pytest.mark.parametrize("factor", [2, 4, 1.5])
def test_pictures_that_are_enlarged_and_cut_by_one_node(lab: Lab, factor: float) -> None:
    large = (int(PICTURE[0] * factor), int(PICTURE[1] * factor))
    region = (int(9 * factor), int(31 * factor), int(9 * factor) + 32, int(31 * factor) + 32)
    (found,) = lab.views(*(cut_hints(prompt, region, large, (32, 32)) for prompt in lab.place()))
    assert near(found, view_of(region, large), 0.0 if factor in (2, 4) else 0.3)


@pytest.mark.parametrize("region", REGIONS)
def test_cut_masks_tell_the_part_to_the_pixel(lab: Lab, region: tuple[int, ...]) -> None:
    assert lab.views(*(cut_masks(prompt, region) for prompt in lab.place())) == {view_of(region)}


def test_masks_that_prompts_had_before_tell_it_too(lab: Lab) -> None:
    painted = torch.rand(3, 32, 48)[1:]  # half the picture's size, part of a larger block of memory
    prompts = lab.place(
        [[text, {**values, "mask": painted}] for text, values in lab.positive],
        [[text, {**values, "mask": painted[0]}] for text, values in lab.negative],
    )
    assert torch.equal(prompts[0][0][1]["mask"], painted)
    assert lab.views(*(cut_masks(prompt, (8, 8, 24, 40)) for prompt in prompts)) == {(0.25, 8 / 48, 0.75, 40 / 48)}


@pytest.mark.parametrize("cut", ["hints", "masks", "nothing"])
def test_a_model_without_people_draws_the_same_bit_for_bit(lab: Lab, cut: str) -> None:
    region = (8, 24, 40, 88)
    cutting = {
        "hints": lambda prompt: cut_hints(prompt, region, PICTURE, (32, 64)),
        "masks": lambda prompt: cut_masks(prompt, region),
        "nothing": lambda prompt: prompt,
    }[cut]
    for hw, batch in itertools.product([(4, 8), (8, 12)], (1, 2)):
        plain = lab.run(lab.model, lab.positive, lab.negative, hw, batch=batch)
        placed = [cutting(prompt) for prompt in lab.place()]
        assert torch.equal(lab.run(lab.model, *placed, hw, batch=batch), plain)
        told, calls = lab.sample(*placed, hw, batch=batch)
        assert torch.equal(told, plain)
        assert [len(kinds) for kinds, _ in calls] == [2, 2], "both prompts are still computed together"


@pytest.mark.parametrize("order", ["before", "behind", "both"])
def test_controlnets_before_and_behind_it_do_the_same_as_without(lab: Lab, order: str) -> None:
    region = (8, 24, 40, 88)

    def chain(placed: bool) -> tuple[Any, Any]:
        prompts = (lab.positive, lab.negative)
        if order in ("before", "both"):
            prompts = lab.control(*prompts)
        if placed:
            prompts = lab.place(*prompts)
        return lab.control(*prompts) if order in ("behind", "both") else prompts

    plain = [cut_hints(prompt, region, PICTURE, (32, 64)) for prompt in chain(placed=False)]
    placed = [cut_hints(prompt, region, PICTURE, (32, 64)) for prompt in chain(placed=True)]
    expected = lab.run(lab.model, *plain, (4, 8))
    found, calls = lab.sample(*placed, (4, 8))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(expected, lab.run(lab.model, lab.positive, lab.negative, (4, 8)), atol=1e-3)
    assert {view for kinds, view in calls if 0 in kinds} == {view_of(region)}


def test_a_controlnet_for_the_positive_prompt_alone_stays_there(lab: Lab) -> None:
    positive, _ = lab.control(lab.positive, lab.negative)
    expected = lab.run(lab.model, positive, lab.negative, (8, 12))
    assert torch.equal(lab.run(lab.model, *lab.place(positive), (8, 12)), expected)
    lent = [[text, {**values, "control_apply_to_uncond": True}] for text, values in positive]
    for_both = lab.run(lab.model, lent, lab.negative, (8, 12))
    assert not torch.equal(for_both, expected)
    assert torch.equal(lab.run(lab.model, *lab.place(lent), (8, 12)), for_both)


def test_tiles_in_one_batch_are_told_apart(lab: Lab) -> None:
    regions = [(0, 0, 32, 32), (0, 32, 32, 64), (32, 33, 64, 65)]
    cut = [cut_hints(prompt, regions, PICTURE, (32, 32)) for prompt in lab.place()]
    _, calls = lab.sample(*cut, batch=3)
    wanted = tuple(view_of(region) for region in regions)
    assert all(view == wanted * len(kinds) for kinds, view in calls)


def test_nodes_that_cut_inside_the_model_tell_it_at_every_tile(lab: Lab) -> None:
    tiles = [(0, 0, 4, 8), (0, 4, 8, 12), (4, 2, 8, 6)]
    cutting = CutsInside(tiles)
    model = lab.model.clone()
    held = lab.place()[0][0][1]["control"]
    model.set_model_unet_function_wrapper(lambda apply, given: cutting(apply, {**given, "control": held}))
    _, calls = lab.sample(lab.positive, lab.negative, (8, 12), model=model)
    assert [view for _, view in calls[:3]] == [view_of(tile, (8, 12)) for tile in tiles]
    held.cleanup()
    assert held.hint is held.numbers


def test_areas_and_several_prompts(lab: Lab) -> None:
    import nodes

    (left,) = nodes.ConditioningSetArea().append(lab.positive, 48, 64, 0, 0, 1.0)
    positive = nodes.ConditioningCombine().combine(lab.positive, left)[0]
    expected = lab.run(lab.model, positive, lab.negative, (8, 12))
    placed = lab.place(positive)
    assert torch.equal(lab.run(lab.model, *placed, (8, 12)), expected)
    assert "mask" not in placed[0][1][1], "the host blends areas with a mask otherwise"
    found = lab.views(*(cut_masks(prompt, (0, 0, 32, 32)) for prompt in placed), hw=(8, 12))
    assert found == {view_of((0, 0, 32, 32))}, "one prompt that was cut tells it for all: it is one latent"


def test_nothing_stays_behind(lab: Lab) -> None:
    before = [(set(values), id(values)) for prompt in (lab.positive, lab.negative) for _, values in prompt]
    prompts = lab.place()
    kept = [set(values) for prompt in prompts for _, values in prompt]
    cut = [cut_hints(prompt, (0, 0, 32, 32), PICTURE, (32, 32)) for prompt in prompts]
    first, second = lab.views(*cut), lab.views(*cut)
    assert first == second == {view_of((0, 0, 32, 32))}
    assert lab.views(*(cut_masks(prompt, (32, 0, 64, 32)) for prompt in prompts)) == {view_of((32, 0, 64, 32))}
    assert lab.views(lab.positive, lab.negative) == {None}
    assert before == [(set(values), id(values)) for prompt in (lab.positive, lab.negative) for _, values in prompt]
    assert kept == [set(values) for prompt in prompts for _, values in prompt]
    assert not [key for key in lab.model.model_options["transformer_options"] if key.startswith("fusedid")]


def test_a_known_place_needs_nobody_to_cut(lab: Lab) -> None:
    parts = lab.pack.submodule("nodes.picture_parts")
    part = parts.Part((64, 96), (0, 24, 32, 56), (0, 0, 0, 0), (64, 64))
    prompts = lab.place(place=part)
    assert lab.views(*prompts, hw=(8, 8)) == {(0.0, 0.25, 0.5, 56 / 96)}
    other = lab.place(place=parts.Part((64, 96), (0, 0, 32, 32), (0, 0, 0, 0), (64, 64)))
    with pytest.raises(ValueError, match="told to show different parts"):
        lab.sample(prompts[0], other[1])
    for given in ({"place": part, "image": torch.zeros(1, 8, 8, 3)}, {"place": None}):
        with pytest.raises(ValueError, match=r"FusedIDPlaceInPicture: got (both|none) of"):
            lab.place(**given)


def test_who_cuts_neither_is_shown_on_the_node_that_runs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import server
    from comfy_execution.utils import CurrentNodeContext

    shown: list[tuple[str, str]] = []
    stand_in = SimpleNamespace(send_progress_text=lambda text, node: shown.append((node, text)))
    monkeypatch.setattr(server.PromptServer, "instance", stand_in, raising=False)
    prompts = lab.place()
    with CurrentNodeContext("prompt", "17"):
        lab.sample(*prompts, hw=(8, 12))
        lab.sample(*(cut_masks(prompt, (0, 0, 32, 32)) for prompt in prompts))
        lab.sample(*(cut_hints(prompt, (0, 0, 32, 32), PICTURE, (32, 32)) for prompt in prompts))
        lab.sample(lab.positive, lab.negative)
        assert shown == []
        lab.sample(*prompts, hw=(4, 4))
        ((node, text),) = shown
        assert node == "17" and "32 x 32 pixels are sampled" in text and "the picture of" in text
        control = prompts[0][0][1]["control"].copy()
        control.cond_hint_original = control.numbers.flip(3)
        control.set_previous_controlnet(prompts[0][0][1]["control"].previous_controlnet.copy())
        control.previous_controlnet.cond_hint_original = control.previous_controlnet.numbers.clone()
        lab.sample([[text, {**values, "control": control}] for text, values in prompts[0]], prompts[1])
        assert len(shown) == 2 and "does not tell which part" in shown[1][1]


def test_the_part_of_the_masks_is_that_of_the_picture(lab: Lab) -> None:
    """Hard masks at the picture's size: exactly the masks' own pixels, whoever cut them and how."""
    masks = (torch.rand(3, *PICTURE, generator=torch.Generator().manual_seed(5)) > 0.5).float()
    for region in REGIONS[:-1]:
        prompts = lab.place()
        size = (region[2] - region[0], region[3] - region[1])
        hints = [cut_hints(prompt, region, PICTURE, size) for prompt in prompts]
        for cut in (hints, [cut_masks(prompt, region) for prompt in prompts]):
            (view,) = lab.views(*cut)
            found = masks if view is None else view_masks(masks, view)
            assert torch.equal(found, masks[:, region[0] : region[2], region[1] : region[3]])
