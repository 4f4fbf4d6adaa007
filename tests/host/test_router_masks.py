"""MultiIDMaskRouter on painted masks: what travels along a chain, who gets what, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import router_lab as lab
import torch
from torch import Tensor

REFUSED = r"^MultiIDMaskRouter: "


@pytest.fixture(scope="module")
def people(pack: Any) -> list[Any]:
    return [lab.person(pack, name) for name in ("Anna", "Ben", "Cleo")]


def meeting() -> list[Tensor]:
    """Three masks that meet around (30, 40); the middle one is the smallest and none lies wholly under another."""
    places = [(slice(0, 50), slice(0, 60)), (slice(15, 55), slice(25, 62)), (slice(20, 64), slice(30, 96))]
    return [lab.box(rows, columns) for rows, columns in places]


def box_mean(mask: Tensor, radius: int) -> Tensor:
    """Mean over a square cut off at the border, pixel by pixel."""
    height, width = mask.shape
    out = torch.empty_like(mask)
    for y, x in itertools.product(range(height), range(width)):
        rows = slice(max(0, y - radius), y + radius + 1)
        out[y, x] = mask[rows, max(0, x - radius) : x + radius + 1].mean()
    return out


def test_each_person_keeps_their_mask_in_the_order_of_the_chain(pack, people):
    masks = lab.columns(3)
    routed, preview, output = lab.chain(pack, people, masks)
    assert routed.identities == tuple(people)
    assert torch.equal(output, torch.cat(masks)) and torch.equal(routed.masks, output)
    assert preview.shape[-1] == 3 and not routed.soft


def test_inputs_of_the_first_version_are_enough(pack, people):
    node = pack.nodes["MultiIDMaskRouter"]
    first = node.execute(identity=people[0], mask=lab.columns(2)[0]).args[0]
    routed = node.execute(identity=people[1], mask=lab.columns(2)[1], routed=first).args[0]
    assert (routed.background, routed.soft, routed.separation) == ("all", False, 0.0)
    assert torch.equal(routed.masks, torch.cat(lab.columns(2)))


def test_the_last_node_s_settings_count_for_everybody(pack, people):
    masks = [
        lab.box(slice(0, 64), slice(0, 50)),
        lab.box(slice(0, 64), slice(40, 80)),
        lab.box(slice(9, 30), slice(60, 96)),
    ]
    last = {"feather": 3, "background": "none", "overlap": "last on top", "separation": 2.0}
    early = {"feather": 40, "background": "all", "overlap": "first on top", "separation": 9.0}
    plain = lab.chain(pack, people, masks, last=last)
    mixed = lab.chain(pack, people, masks, each=early, last=last)
    assert torch.equal(plain[2], mixed[2]) and torch.equal(plain[1], mixed[1])
    settings = [(r.background, r.soft, r.separation) for r in (plain[0], mixed[0])]
    assert settings == [("none", True, 2.0)] * 2


@pytest.mark.parametrize(("overlap", "owner"), [("first on top", 0), ("last on top", 2), ("larger value", 1)])
def test_overlaps_are_resolved_from_the_painted_masks(pack, people, overlap, owner):
    masks = meeting()
    result = lab.chain(pack, people, masks, last={"overlap": overlap})[2]
    assert result[:, 30, 40].tolist() == [float(i == owner) for i in range(3)]
    assert set(result.unique().tolist()) == {0.0, 1.0} and float(result.sum(0).max()) == 1.0


def test_the_larger_grey_value_wins(pack, people):
    masks = [lab.box(slice(0, 64), slice(0, 60), value=0.6), lab.box(slice(0, 64), slice(40, 96), value=0.9)]
    result = lab.chain(pack, people[:2], masks)[2]
    assert result[:, 5, 50].tolist() == [0.0, 1.0] and result[:, 5, 10].tolist() == [1.0, 0.0]


def test_two_greys_of_one_half_are_an_overlap(pack, people):
    masks = [lab.box(slice(0, 64), slice(0, 90), value=0.5), lab.box(slice(0, 64), slice(40, 96), value=0.5)]
    result = lab.chain(pack, people[:2], masks)[2]
    assert result[:, 5, 50].tolist() == [0.0, 1.0]
    assert float(result.sum(0).max()) == 1.0


@pytest.mark.parametrize("radius", [1, 6])
def test_feathering_happens_once_and_is_the_mean_over_a_square(pack, people, radius):
    masks = lab.columns(3, (20, 30))
    result = lab.chain(pack, people, masks, each={"feather": radius})[2]
    wanted = torch.stack([box_mean(mask[0], radius) for mask in masks])
    assert torch.allclose(result, wanted, atol=1e-6)
    assert torch.allclose(result.sum(0), torch.ones(20, 30), atol=1e-6)


def test_a_feather_wider_than_the_picture_still_tells_people_apart(pack, people):
    result = lab.chain(pack, people, lab.columns(3), last={"feather": 256})[2]
    assert result.isfinite().all() and (result > 0.3).all() and float(result.sum(0).max()) <= 1 + 1e-5


def test_grey_stays_grey_with_feather_and_is_cut_at_one_half_without(pack, people):
    mask = torch.linspace(0, 1, 96).expand(1, 64, 96)
    assert torch.equal(lab.route(pack, people[0], mask=mask)[2], (mask >= 0.5).float())
    soft = lab.route(pack, people[0], mask=mask, feather=1)[2]
    assert torch.allclose(soft[:, :, 1:-1], mask[:, :, 1:-1], atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"feather": 5}])
def test_the_order_of_people_with_their_masks_does_not_matter(pack, people, settings):
    """Promise 7."""
    masks = meeting()
    straight = lab.chain(pack, people, masks, last=settings)[2]
    for order in itertools.permutations(range(3)):
        turned = lab.chain(pack, [people[i] for i in order], [masks[i] for i in order], last=settings)[2]
        assert torch.allclose(turned, straight[list(order)], atol=1e-6), order


@pytest.mark.parametrize("shape", [(64, 96), (1, 64, 96), (1, 1, 64, 96)])
def test_one_mask_in_every_spelling(pack, people, shape):
    mask = lab.columns(2)[0].reshape(shape)
    assert torch.equal(lab.route(pack, people[0], mask=mask)[2], lab.columns(2)[0])


def test_masks_of_other_sizes_meet_at_the_largest(pack, people):
    masks = [lab.columns(3, size)[i] for i, size in enumerate([(64, 96), (512, 768), (255, 384)])]
    for order in itertools.permutations(range(3)):
        result = lab.chain(pack, [people[i] for i in order], [masks[i] for i in order])[2]
        assert result.shape == (3, 512, 768)
        assert (result[:, 100, [10, 400, 700]] == torch.eye(3)[list(order)]).all()


def test_other_proportions_are_refused_with_both_sizes(pack, people):
    masks = [lab.columns(2)[0], lab.columns(2, (512, 512))[1]]
    with pytest.raises(ValueError, match=REFUSED + "one mask is 96 x 64, another 512 x 512: .* proportions"):
        lab.chain(pack, people[:2], masks)


def test_a_batch_of_masks_is_refused(pack, people):
    with pytest.raises(ValueError, match=REFUSED + "got a batch of 3 masks for one person.*one router per person"):
        lab.route(pack, people[0], mask=torch.cat(lab.columns(3)))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.zeros(1, 64, 64), r"the mask \(64 x 64\) is empty.*LoadImage"),
        (torch.full((1, 8, 8), float("nan")), "NaN or infinite"),
        (lab.box(slice(0, 9), slice(0, 9), value=float("inf")), "NaN or infinite"),
        (torch.zeros(0, 64, 64), r"shape \[0, 64, 64\]"),
        (torch.zeros(1, 0, 64), r"shape \[1, 0, 64\]"),
        (torch.ones(7), r"shape \[7\]"),
        (lab.box(slice(0, 9), slice(0, 9), value=0.3), "reaches 0.30 at most.*feather above 0"),
    ],
)
def test_unusable_masks_are_refused(pack, people, mask, reason):
    with pytest.raises(ValueError, match=REFUSED + ".*" + reason):
        lab.route(pack, people[0], mask=mask)


@pytest.mark.parametrize("overlap", ["larger value", "first on top", "last on top"])
def test_equal_masks_are_refused(pack, people, overlap):
    with pytest.raises(ValueError, match=REFUSED + ".*lies wholly under the other masks.*Move the masks apart"):
        lab.chain(pack, people[:2], [lab.columns(2)[0]] * 2, last={"overlap": overlap})


@pytest.mark.parametrize("feather", [0, 3])
def test_one_painted_pixel_owns_a_token_at_every_level(pack, people, feather):
    masks = [lab.box(slice(100, 101), slice(200, 201), (512, 768)), lab.box(slice(0, 512), slice(0, 768), (512, 768))]
    routed = lab.chain(pack, people[:2], masks, last={"feather": feather})[0]
    weights = pack.submodule("attention.routing").token_weights
    for grid in ((64, 96), (32, 48), (16, 24), (8, 12)):
        owned = weights(routed.masks, grid, background="none", soft=routed.soft)
        assert float(owned[0].max()) == 1.0, grid


def test_a_mask_of_one_pixel_is_the_whole_picture(pack, people):
    assert lab.route(pack, people[0], mask=torch.ones(1, 1, 1))[2].tolist() == [[[1.0]]]
    whole = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match=REFUSED + ".*wholly under"):
        lab.chain(pack, people[:2], [whole, whole])


def test_a_chain_without_places_says_so_instead_of_carrying_empty_masks(pack, people):
    wires = pack.submodule("nodes.wire_types")
    routed, preview, masks = lab.chain(pack, people, [None, lab.columns(3)[1], None])
    assert routed.masks is None and preview.shape[0] == 1
    waiting = r"waiting: person 1 \(Anna\), person 3 \(Cleo\)\. Connect a mask"
    with pytest.raises(ValueError, match=waiting):
        wires.require_places(routed)
    assert type(masks).__name__ == "ExecutionBlocker" and "waiting: person 1 (Anna)" in masks.message
    wires.require_places(lab.chain(pack, people, lab.columns(3))[0])
