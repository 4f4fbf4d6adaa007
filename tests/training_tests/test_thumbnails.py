"""What a miniature base is conditioned on: the code of a place, the tokens, and how often there are none."""

from __future__ import annotations

import pytest
import torch

from training.data import thumbnail_side
from training.randomness import generator
from training.thumbnails import COLORS, PLACE, SIDES, place_code, thumbnail_tokens


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (8, 6)])
def test_a_place_is_most_like_itself_and_less_like_what_is_farther(grid):
    code = place_code(*grid)
    scores = (code @ code.T).reshape(len(code), *grid)
    assert scores.flatten(1).argmax(1).tolist() == list(range(len(code)))
    others = scores.flatten(1) - torch.diag(torch.full((len(code),), float("inf")))
    assert float(others.max()) < 0.85 * float(scores[0, 0, 0]), "any other place is told apart"
    if grid == (16, 16):
        assert bool((scores[0, 0, :3].diff() < 0).all()), "near places have like codes"


def test_grids_of_different_size_agree_about_a_place():
    fine = place_code(16, 16).reshape(8, 2, 8, 2, PLACE).mean((1, 3)).flatten(0, 1)
    scores = fine @ place_code(8, 8).T
    assert scores.argmax(1).tolist() == list(range(64))


def test_a_token_holds_the_colours_of_its_place_and_no_thumbnail_is_zeros():
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = thumbnail_tokens(pixels, [32, 0], 768)
    assert tokens.shape == (2, 256, 768) and not tokens[1].any() and not tokens[0, :, PLACE + COLORS :].any()
    assert torch.equal(tokens[0, :, :PLACE], place_code(16, 16))
    colors = tokens[0, 16 * 3 + 5, PLACE : PLACE + COLORS].reshape(3, 2, 2)
    wanted = pixels[0, :, 24:32, 40:48].reshape(3, 2, 4, 2, 4).mean((2, 4))
    torch.testing.assert_close(colors, wanted)


def test_a_smaller_thumbnail_says_less():
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spread = [float(thumbnail_tokens(pixels, [side], 768)[0, :, PLACE : PLACE + COLORS].std()) for side in SIDES]
    assert spread == sorted(spread) and spread[0] < 0.5 * spread[-1]


def test_a_narrow_context_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        thumbnail_tokens(torch.zeros(1, 3, 16, 16), [8], 32)


def test_thumbnails_are_left_out_as_often_as_asked():
    sides = [thumbnail_side(0.3, generator(0, i, "condition")) for i in range(1000)]
    assert 0.25 < sides.count(0) / 1000 < 0.35
    assert set(sides) == {0, *SIDES}
