"""Cross-attention that looks for the same place: the fit, the scores, and a base that stays the same function."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from memory_source import MemorySource

from training import positions
from training.base import load_base
from training.config import ModelConfig
from training.new_base import write_new_base
from training.positions import (
    SCORE_GAP,
    fitted,
    looking,
    pictures,
    set_positions,
    sharpness,
    with_fine_attention,
)
from training.thumbnails import PLACE, place_code, thumbnail_tokens


@pytest.fixture
def base(tmp_path: Path):
    out = tmp_path / "base"
    write_new_base(Namespace(out=str(out), multipliers=[1, 1], layers=1, prediction="v_prediction", seed=0))
    return load_base(ModelConfig(base=str(out)))


def test_the_fit_finds_a_linear_relation_and_is_not_misled_by_noise():
    generator = torch.Generator().manual_seed(0)
    code, mixing = place_code(8, 8), torch.randn(PLACE, 64, generator=generator)
    clean = (code @ mixing).expand(32, 64, 64)
    noisy = clean + 2 * torch.randn(32, 64, 64, generator=generator)
    read = noisy @ fitted(noisy, code).T
    error = (read - code).square().mean() / code.square().mean()
    assert float(error) < 0.2


@pytest.mark.parametrize("grid", [(8, 8), (16, 16)])
def test_the_score_falls_by_the_same_on_every_grid(grid):
    code = place_code(*grid)
    scores = sharpness(grid) * (code @ code.T)[0]
    assert float(scores[0] - scores[1]) == pytest.approx(SCORE_GAP, abs=1e-4)
    assert int(scores.argmax()) == 0


def test_every_looking_head_reads_the_same_and_nothing_else():
    read = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    weight = looking(read, heads=2, width=5)
    assert torch.equal(weight[:3], read) and torch.equal(weight[5:8], read)
    assert weight.shape == (10, 7) and not weight[3:5].any() and not weight[8:].any()


def test_the_base_stays_the_same_and_its_cross_attention_finds_the_place(base):
    x, t, text = torch.randn(1, 4, 16, 16), torch.tensor([700]), base.prompts([""])[0]
    with torch.no_grad():
        plain = base.unet(x, t, encoder_hidden_states=text).sample
        base.pipeline.register_modules(unet=with_fine_attention(base.unet))
        assert len(base.unet.up_blocks[-1].attentions) == 2
        set_positions(base, base.encode(pictures(MemorySource(4), 4, 128)), 128)
        torch.testing.assert_close(base.unet(x, t, encoder_hidden_states=text).sample, plain, atol=1e-6, rtol=1e-5)
    block = base.unet.down_blocks[1].attentions[0].transformer_blocks[0]
    tokens = thumbnail_tokens(torch.zeros(1, 3, 128, 128), [16], 768, (8, 8))
    keys = block.attn2.to_k(tokens).unflatten(-1, (8, 40))[0]
    assert int(keys[:, 0, PLACE:].abs().max() > 0) == 0, "a looking head knows the place and no colour"
    code = place_code(8, 8)
    gain = float(keys[:, 0, :PLACE].norm() / code.norm())
    torch.testing.assert_close(keys[:, 0, :PLACE], gain * code, atol=1e-4, rtol=1e-4)
    scores = gain * code @ keys[:, 0, :PLACE].T / 40**0.5
    assert scores.argmax(1).tolist() == list(range(64))


def test_a_unet_of_another_kind_gets_no_fine_attention(base):
    base.unet.register_to_config(block_out_channels=(320, 640))
    with pytest.raises(ValueError, match="no place for"):
        with_fine_attention(base.unet)


def test_nothing_is_overwritten(tmp_path, caplog):
    (tmp_path / "old").write_text("")
    words = ["--base", "nowhere", "--data", "nowhere", "--out", str(tmp_path)]
    assert positions.main(words) == 2 and "not empty" in caplog.text
