"""FusedIDCutPicture and FusedIDPasteParts; and what people look like in the parts of a picture."""

from __future__ import annotations

from typing import Any

import fusion_lab
import peer_ours
import pytest
import torch
from fusion_lab import FusionLab, halves
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_standins import cut_hints, cut_masks
from torch import Tensor

PICTURE = (64, 128)


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models)


@pytest.fixture(scope="module")
def parts(pack: Any) -> Any:
    return pack.submodule("nodes.picture_parts")


def picture(height: int, width: int) -> Tensor:
    """Smooth IMAGE `[1, H, W, 3]`."""
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    return torch.stack([rows.expand(height, width), columns.expand(height, width), rows * columns], -1)[None]


@settings(max_examples=60)
@given(
    hw=st.tuples(st.integers(9, 400), st.integers(9, 400)),
    size=st.sampled_from([64, 128, 192]),
    margin=st.floats(0, 0.5),
)
def test_tiles_cover_the_picture_and_put_it_together_again(
    parts: Any, hw: tuple[int, int], size: int, margin: float
) -> None:
    found = parts.tile_parts(hw, size=size, margin=margin)
    image = picture(*hw)
    seen = torch.zeros(hw)
    for part in found:
        top, left, bottom, right = part.box
        assert 0 <= top < bottom <= hw[0] and 0 <= left < right <= hw[1]
        assert bottom - top <= size and right - left <= size and part.size_hw[0] % 8 == part.size_hw[1] % 8 == 0
        seen[top:bottom, left:right] += 1
    assert float(seen.min()) >= 1
    again = parts.put_back(image, [(part, parts.cut_out(image, part)) for part in found])
    assert torch.allclose(again, image, atol=0.02 if any(side % 8 for side in hw) else 1e-5)
    anew = parts.put_back(image, [(part, torch.ones(1, *part.size_hw, 3)) for part in found])
    assert torch.allclose(anew, torch.ones_like(anew), atol=1e-5), "no seam shows what was there before"


def test_everybodys_part_is_a_square_around_their_region_enlarged(parts: Any) -> None:
    masks = torch.zeros(3, 64, 96)
    masks[0, 20:30, 40:48], masks[1, 0:6, 90:96], masks[2, :, 30:60] = 1, 1, 1
    first, corner, tall = parts.people_parts(masks, (640, 960), size=512, margin=0.5)
    assert first.box == (150, 340, 350, 540) and first.size_hw == (512, 512) and first.soft == (25, 25, 25, 25)
    assert corner.box == (0, 840, 120, 960) and corner.soft == (0, 15, 15, 0)
    assert tall.box == (0, 0, 640, 960) and tall.size_hw == (640, 960), "never made smaller"
    image = picture(640, 960)
    bright = parts.put_back(image, [(first, torch.ones(1, 512, 512, 3))])
    outside = torch.ones(640, 960, dtype=torch.bool)
    outside[150:350, 340:540] = False
    assert torch.equal(bright[0][outside], image[0][outside])
    assert float(bright[0, 180:320, 370:510].min()) > 0.999
    assert 0.4 < float(bright[0, 250, 352, 0] - image[0, 250, 352, 0]) / (1 - float(image[0, 250, 352, 0])) < 0.6


def test_what_the_nodes_refuse(pack: Any, lab: FusionLab) -> None:
    cut, paste = pack.nodes["FusedIDCutPicture"], pack.nodes["FusedIDPasteParts"]
    image = picture(64, 64)
    with pytest.raises(ValueError, match="FusedIDCutPicture: 'routed' is not connected"):
        peer_ours.run_node(cut, image=image, parts="people")
    with pytest.raises(ValueError, match=r"margin is 0\.6"):
        peer_ours.run_node(cut, image=image, parts="tiles", margin=0.6)
    pieces, places = peer_ours.run_node(cut, image=image, parts="tiles", size=128)
    with pytest.raises(ValueError, match="FusedIDPasteParts: got 1 pictures, 2 parts and 1 places"):
        paste.execute(image=[image], parts=[*pieces, *pieces], places=places)
    with pytest.raises(ValueError, match="this one is 32 x 64"):
        paste.execute(image=[picture(64, 32)], parts=pieces, places=places)


def place(lab: FusionLab, prompts: Any, **given: Any) -> Any:
    return peer_ours.run_node(
        lab.pack.nodes["FusedIDPlaceInPicture"], positive=prompts[0], negative=prompts[1], **given
    )


def told(lab: FusionLab, parts: Any, how: str, region: tuple[int, int, int, int]) -> dict[str, Any]:
    """Both prompts for a part of the picture, told in one of the ways."""
    size = (region[2] - region[0], region[3] - region[1])
    prompts = (lab.positive, lab.negative)
    if how == "place":
        part = parts.Part(PICTURE, region, (0, 0, 0, 0), size)
        positive, negative = place(lab, prompts, place=part)
    else:
        positive, negative = place(lab, prompts, image=torch.zeros(1, *PICTURE, 3))
        if how == "hints":
            positive, negative = (cut_hints(one, region, PICTURE, (64, 64)) for one in (positive, negative))
        else:
            positive, negative = (cut_masks(one, region) for one in (positive, negative))
    return {"positive": positive, "negative": negative}


@pytest.mark.parametrize("how", ["hints", "masks", "place"])
def test_a_part_shows_the_people_who_are_there_and_nobody_else(lab: FusionLab, parts: Any, how: str) -> None:
    """Left half one person, right half another: a tile of the left half is what the one person alone makes it."""
    people = [lab.identity(0), lab.identity(1)]
    both, _ = lab.patch(routed=lab.routed(people, halves(*PICTURE), background="none"))
    alone = [lab.sample(lab.patch(identity=person)[0]) for person in people]
    assert fusion_lab.largest(alone[0] - alone[1]) > 1e-3
    for number, region in enumerate([(0, 0, 64, 64), (0, 64, 64, 128)]):
        found = lab.sample(both, **told(lab, parts, how, region))
        assert fusion_lab.largest(found - alone[number]) < 1e-5


@pytest.mark.parametrize("how", ["hints", "masks", "place"])
@pytest.mark.parametrize(("background", "separation"), [("all", 0.0), ("none", 4.0)])
def test_a_part_is_what_the_masks_of_that_part_make_it(
    lab: FusionLab, parts: Any, how: str, background: str, separation: float
) -> None:
    people = [lab.identity(0), lab.identity(1)]
    masks = [torch.zeros(PICTURE), torch.zeros(PICTURE)]
    masks[0][8:56, 16:64], masks[1][:, 72:112] = 1, 1
    settings = {"background": background, "separation": separation}
    whole, _ = lab.patch(routed=lab.routed(people, masks, **settings))
    for left in (0, 32, 64):
        region = (0, left, 64, left + 64)
        seen = [mask[:, left : left + 64] for mask in masks]
        if not all(bool(mask.any()) for mask in seen):  # the router refuses people who are nowhere
            continue
        by_hand, _ = lab.patch(routed=lab.routed(people, seen, **settings))
        found = lab.sample(whole, **told(lab, parts, how, region))
        assert fusion_lab.largest(found - lab.sample(by_hand)) < 1e-5
    assert fusion_lab.largest(lab.sample(whole) - lab.sample(by_hand)) > 1e-3


def test_a_picture_in_tiles_is_made_of_what_its_tiles_make(lab: FusionLab, parts: Any) -> None:
    """Through all the nodes: a tile of every half, each with one person."""
    import nodes

    people = [lab.identity(0), lab.identity(1)]
    both, _ = lab.patch(routed=lab.routed(people, halves(128, 256), background="none"))
    image = picture(128, 256)
    pieces, places = peer_ours.run_node(
        lab.pack.nodes["FusedIDCutPicture"], image=image, parts="tiles", size=128, margin=0.0
    )
    assert len(pieces) == 2
    made = []
    for piece, where in zip(pieces, places):
        positive, negative = place(lab, (lab.positive, lab.negative), place=where)
        latent = nodes.VAEEncode().encode(lab.vae, piece)[0]["samples"]
        given = {"latent": latent, "denoise": 0.5}
        found = lab.sample(both, positive=positive, negative=negative, **given)
        expected = lab.sample(lab.patch(identity=people[len(made)])[0], **given)
        assert fusion_lab.largest(found - expected) < 1e-5
        made.append(nodes.VAEDecode().decode(lab.vae, {"samples": found})[0])
    (again,) = lab.pack.nodes["FusedIDPasteParts"].execute(image=[image], parts=made, places=places).args
    assert torch.allclose(again[:, :, :128], made[0].clamp(0, 1), atol=1e-6)
    assert torch.allclose(again[:, :, 128:], made[1].clamp(0, 1), atol=1e-6)
