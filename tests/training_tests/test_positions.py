"""Queries that look for the same place: the code of a place, the fit, and a base that stays the same function."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from memory_source import MemorySource

from attention.adapter import AdapterSettings, FusionAdapter
from training import positions
from training.base import load_base
from training.config import ModelConfig
from training.new_base import write_new_base
from training.positions import fitted, looking_weights, place_code, set_positions
from training.unet import FusedUNet, Reference, TextContext


@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (8, 6)])
def test_a_place_is_most_like_itself_and_less_like_what_is_farther(grid):
    code = place_code(*grid)
    scores = (code @ code.T).reshape(len(code), *grid)
    assert scores.flatten(1).argmax(1).tolist() == list(range(len(code)))
    row = scores[0, 0]
    assert float(row[0] - row[1:].max()) >= 1.9, "any other place is told apart"
    if grid == (8, 8):
        assert bool((row[:3].diff() < 0).all()), "near places have like codes"


def test_the_fit_finds_a_linear_relation_and_is_not_misled_by_noise():
    generator = torch.Generator().manual_seed(0)
    code, mixing = place_code(8, 8), torch.randn(16, 64, generator=generator)
    clean = (code @ mixing).expand(32, 64, 64)
    noisy = clean + 2 * torch.randn(32, 64, 64, generator=generator)
    read = noisy @ fitted(noisy, code).T
    error = (read - code).square().mean() / code.square().mean()
    assert float(error) < 0.2


def test_half_of_the_heads_compare_places_and_half_stay():
    generator = torch.Generator().manual_seed(0)
    query, key, noisy, clean = (torch.randn(n, 64, generator=generator) for n in (64, 64, 16, 16))
    new_query, new_key = looking_weights(query, key, noisy, clean, heads=2)
    assert torch.equal(new_query[32:], query[32:]) and torch.equal(new_key[32:], key[32:])
    hidden = torch.randn(5, 64, generator=generator)
    scores = (hidden @ new_query[:32].T) @ (hidden @ new_key[:32].T).T / 32**0.5
    wanted = positions.SHARPNESS * (hidden @ noisy.T) @ (hidden @ clean.T).T
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-3)


def test_the_base_stays_the_same_and_its_start_shows_nobody_yet(tmp_path: Path):
    out = tmp_path / "base"
    write_new_base(Namespace(out=str(out), multipliers=[1], layers=1, prediction="v_prediction", seed=0))
    base = load_base(ModelConfig(base=str(out)))
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([700]), base.prompts([""])[0]
    queries = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.weight
    before = queries.clone()
    with torch.no_grad():
        plain = base.unet(x, t, encoder_hidden_states=text).sample
        start = set_positions(base, MemorySource(4), count=4, side=64)
        torch.testing.assert_close(base.unet(x, t, encoder_hidden_states=text).sample, plain, atol=1e-6, rtol=1e-5)
        assert not torch.equal(queries, before)
        settings = AdapterSettings(base=base.family, reference_size=64)
        fused = FusedUNet(base.unet, settings).eval()
        fused.load_adapter(FusionAdapter(start, settings, "start"), name="start")
        shown = fused(x, t, TextContext(text), [Reference(torch.randn(1, 4, 8, 8), TextContext(text))])
    torch.testing.assert_close(shown, plain, atol=1e-5, rtol=1e-5)


def test_nothing_is_overwritten(tmp_path, caplog):
    (tmp_path / "old").write_text("")
    words = ["--base", "nowhere", "--data", "nowhere", "--out", str(tmp_path)]
    assert positions.main(words) == 2 and "not empty" in caplog.text
