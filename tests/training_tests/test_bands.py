"""Several people in one picture of the base's training: who stands where, and who sees what."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_run import settings

from training.bands import apart, install_bands, side_by_side
from training.base import load_base
from training.config import ModelConfig, TrainConfig
from training.config_io import validate
from training.new_base import write_new_base
from training.thumbnails import thumbnail_tokens


def test_neighbours_in_the_batch_stand_side_by_side_and_come_apart_again():
    rows = torch.randn(6, 4, 8, 8)
    pictures = side_by_side(rows, 3)
    assert pictures.shape == (2, 4, 8, 24)
    assert torch.equal(pictures[1, :, :, 8:16], rows[4])
    assert torch.equal(apart(pictures, 3), rows) and torch.equal(side_by_side(rows, 1), rows)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("new") / "base"
    write_new_base(Namespace(out=str(out), multipliers=[1], layers=1, prediction="v_prediction", seed=0))
    unet = load_base(ModelConfig(base=str(out))).unet
    install_bands(unet)
    return unet


@torch.no_grad()
def test_every_band_sees_its_own_person_only(unet):
    attn = unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2
    hidden = torch.randn(1, 8 * 16, 320)
    tokens = thumbnail_tokens(torch.rand(2, 3, 64, 64) * 2 - 1, [16, 16], 768, (8, 8))
    both = attn(hidden, encoder_hidden_states=tokens).reshape(8, 16, 320)
    for band, columns in enumerate((slice(0, 8), slice(8, 16))):
        alone = attn(
            hidden.reshape(1, 8, 16, 320)[:, :, columns].flatten(1, 2), encoder_hidden_states=tokens[band : band + 1]
        )
        torch.testing.assert_close(both[:, columns].flatten(0, 1), alone[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_one_person_is_the_plain_attention(unet):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 300])
    tokens = thumbnail_tokens(torch.rand(2, 3, 64, 64) * 2 - 1, [16, 0], 768)
    banded = unet(x, t, encoder_hidden_states=tokens).sample
    unet.set_attn_processor(AttnProcessor2_0())
    torch.testing.assert_close(unet(x, t, encoder_hidden_states=tokens).sample, banded, atol=1e-5, rtol=1e-4)
    install_bands(unet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser__people": (1, 3), "denoiser__condition": "thumbnail", "schedule__batch_size": 4}, "multiple of 3"),
        ({"denoiser__people": (2,), "schedule__batch_size": 4}, "told apart"),
        ({"denoiser__people": (0,), "denoiser__condition": "thumbnail"}, "at least 1"),
        ({"denoiser__condition": "thumbnail", "data__latents": "cached"}, "made from the pictures"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig, settings(Path("base"), Path("run"), method="denoiser", **changes), origin="test")
