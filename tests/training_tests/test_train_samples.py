"""Samples: every draw depends on (seed, epoch, key) alone, and the draws have the promised statistics."""

from __future__ import annotations

import pytest
import torch
from memory_source import MemorySource
from tiny_run import settings

from training.config import AugmentConfig, DropConfig, TrainConfig, without_chance
from training.config_io import validate
from training.data import FusionDraw, StreamDataset, collate, dropped, reference_index
from training.randomness import batches, epoch_order, generator, place, uniform
from training.schedule import lr_factor


def config(**changes: object) -> TrainConfig:
    return validate(TrainConfig, settings("base", "run", **changes), origin="test")


def test_equal_positions_give_equal_samples_whatever_was_read_before():
    first = StreamDataset(MemorySource(6), FusionDraw(config()), seed=0)
    second = StreamDataset(MemorySource(6), FusionDraw(config()), seed=0)
    torch.manual_seed(123)
    one = [first[i] for i in range(12)]
    torch.manual_seed(5)
    two = [second[i] for i in reversed(range(12))][::-1]
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def test_epochs_and_seeds_draw_differently():
    draw = FusionDraw(config())
    source = MemorySource(6)
    a, b = draw(source, 0, 0), draw(source, 0, 1)
    assert not torch.equal(a["noise"], b["noise"])
    assert not torch.equal(a["noise"], FusionDraw(config(seed=1))(source, 0, 0)["noise"])


def test_every_epoch_visits_every_sample_once_in_another_order():
    orders = [[place(position, 7, seed=3).index for position in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert torch.equal(epoch_order(7, 3, 1), torch.tensor(orders[1]))


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(4, 1, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)])
def test_a_step_has_the_same_samples_however_they_are_spread(batch, accumulation, world):
    options = {"start_step": 3, "stop_step": 6, "batch": batch, "accumulation": accumulation, "world": world}
    seen = [position for rank in range(world) for passes in batches(**options, rank=rank) for position in passes]
    assert sorted(seen) == list(range(12, 24))


@pytest.mark.parametrize("drops", [DropConfig(), DropConfig(face=0.3, text=0.2, both=0.1)])
def test_drop_statistics_of_fusion_over_10k_samples(drops):
    n = 10_000
    draws = [dropped(drops, uniform(generator(0, 0, f"key{i}", "drop"))) for i in range(n)]
    shares = [sum(draw == case for draw in draws) / n for case in ((True, False), (False, True), (True, True))]
    assert shares == pytest.approx([drops.face, drops.text, drops.both], abs=0.015)


def test_a_dropped_face_or_text_reaches_the_sample():
    source = MemorySource(4)
    assert FusionDraw(config(drops={"face": 1, "text": 0, "both": 0}))(source, 0, 0)["has_face"] is False
    assert FusionDraw(config(drops={"face": 0, "text": 1, "both": 0}))(source, 0, 0)["caption"] == ""
    kept = FusionDraw(config(drops={"face": 0, "text": 0, "both": 0}))(source, 0, 0)
    assert kept["has_face"] is True and kept["caption"] == "a man a"
    non_human = MemorySource(4, non_human=(0,))
    assert FusionDraw(config(drops={"face": 0, "text": 0, "both": 0}))(non_human, 0, 0)["has_face"] is False


def test_pair_mode_chooses_whose_face_is_shown():
    source = MemorySource(5)
    modes = {
        mode: [reference_index(source, 2, mode, generator(i)) for i in range(400)]
        for mode in ("same", "other", "mixed")
    }
    assert set(modes["same"]) == {2} and set(modes["other"]) == {3}
    assert 0.4 < modes["mixed"].count(3) / 400 < 0.6
    assert reference_index(source, 4, "other", generator(0)) == 4, "a person with one photo is their own reference"


def test_timesteps_are_uniform():
    draw = FusionDraw(config())
    source = MemorySource(2)
    t = torch.tensor([int(draw(source, 0, epoch)["timestep"]) for epoch in range(2000)]).float()
    assert t.min() >= 0 and t.max() <= 999
    assert abs(float(t.mean()) - 499.5) < 25


def test_validation_samples_drop_and_augment_nothing():
    plain = without_chance(config(drops={"face": 1, "text": 0, "both": 0}))
    a, b = (FusionDraw(plain)(MemorySource(4), 0, epoch) for epoch in (0, 1))
    assert a["has_face"] and torch.equal(a["pixels"], b["pixels"])
    assert plain.data.augment == AugmentConfig(flip=0, crop=0, color=0)


def test_samples_have_the_promised_shapes_and_ranges():
    batch = collate([FusionDraw(config())(MemorySource(4), i, 0) for i in range(3)])
    assert batch["pixels"].shape == batch["reference_pixels"].shape == (3, 3, 64, 64)
    assert batch["noise"].shape == batch["vae_noise"].shape == batch["reference_noise"].shape == (3, 4, 8, 8)
    assert float(batch["pixels"].min()) >= -1 and float(batch["pixels"].max()) <= 1
    assert batch["key"] == ["p0", "p1", "p2"] and batch["original_size"] == [(128, 128)] * 3


def test_learning_rate_by_hand():
    schedule = config(schedule__warmup=4, schedule__steps=12, schedule__decay="cosine").schedule
    factors = [lr_factor(step, schedule) for step in (0, 1, 3, 4, 8, 12)]
    assert factors == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.5, 0.0])
    assert lr_factor(10, config(schedule__steps=12).schedule) == 1.0
