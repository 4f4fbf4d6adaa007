"""Fusion can learn: on a small SD1.5-layout UNet it over-fits 8 images through the face projections alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import tiny_models
import torch
from tiny_run import settings, train_tiny

from training.data import FusionDraw


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine count as computing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_fusion_overfits_8_images_by_90_percent_in_3_cpu_minutes(one_thread, tmp_path, monkeypatch):
    """Noise, timestep and crops of every image are held at their first draw: what is left to learn is the 8 images."""
    base = tiny_models.write_base(tmp_path / "base", layers_per_block=2, widths=(64, 128))
    draw = FusionDraw.__call__
    monkeypatch.setattr(FusionDraw, "__call__", lambda self, source, index, epoch: draw(self, source, index, 0))
    run, started = tmp_path / "run", time.process_time()
    learning = {
        "schedule": {"steps": 120, "batch_size": 8, "warmup": 20},
        "optimizer": {"lr": 2e-2, "weight_decay": 0.0},
        "ema__decay": None,
        "drops": {"face": 0, "text": 0, "both": 0},
    }
    data = {"data__pair_mode": "same", "data__latents": "cached"}
    train_tiny(settings(base, run, **learning, **data, checkpoint__every=1000, validation__samples=0))
    seconds = time.process_time() - started
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.1 * losses[0], f"from {losses[0]:.3f} to {losses[-1]:.3f}"
    assert seconds < 180
