"""An adapter's first keys and values say about a reference what the base's own condition would say."""

from __future__ import annotations

from argparse import Namespace

import torch
from memory_source import MemorySource

from attention.adapter import AdapterSettings
from training import adapter_start
from training.base import load_base
from training.config import ModelConfig
from training.new_base import write_new_base
from training.positions import pictures
from training.text import context_for
from training.thumbnails import thumbnail_tokens
from training.unet import FusedUNet, Reference


def test_keys_and_values_are_near_those_of_a_thumbnail(tmp_path):
    out = tmp_path / "base"
    write_new_base(Namespace(out=str(out), multipliers=[1], layers=1, prediction="v_prediction", seed=0))
    base = load_base(ModelConfig(base=str(out)))
    pixels = pictures(MemorySource(16), 16, 128)
    start = adapter_start.adapter_start(base, pixels)
    fused = FusedUNet(base.unet, AdapterSettings(base=base.family, reference_size=128)).eval()
    with torch.no_grad():
        hidden = fused.reference_hidden(
            Reference(base.encode(pixels), context_for(*base.prompts([""]), [(128, 128)], 128))
        )
    entry = fused.site_table[-1]
    block = base.unet.get_submodule(entry.name)
    tokens = thumbnail_tokens(pixels, [32] * 16, 768)
    for weight, own in ((start[entry.path].key, block.attn2.to_k), (start[entry.path].value, block.attn2.to_v)):
        wanted, read = own(tokens), hidden[entry.path] @ weight.T
        left = (read - wanted).square().mean() / (wanted - wanted.mean((0, 1))).square().mean()
        assert float(left) < 0.6, "read from the features of an untrained network, better than knowing nothing"


def test_nothing_is_overwritten(tmp_path, caplog):
    file = tmp_path / "old.safetensors"
    file.write_text("")
    words = ["--base", "nowhere", "--data", "nowhere", "--out", str(file)]
    assert adapter_start.main(words) == 2 and "nothing is overwritten" in caplog.text
