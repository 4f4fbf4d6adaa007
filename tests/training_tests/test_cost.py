"""The cost table's calculation against numbers found independently (TRAINING 5.1)."""

from __future__ import annotations

import prepare_kit as kit
import pytest
import torch

from training.cost import cost, table


def test_operations_of_sd15_at_512(sd15_cost):
    assert sd15_cost.forward == pytest.approx(803, abs=1)
    assert sd15_cost.fused == pytest.approx(122.5, abs=0.5)
    assert sd15_cost.projection == pytest.approx(25.6, abs=0.1)
    assert 2.5e3 < sd15_cost.step < 3.5e3


def test_memory_of_sd15_at_512(sd15_cost):
    assert sd15_cost.trained == 24_780_800
    assert sd15_cost.cache_mib * 2**20 == 46_202_880
    assert sd15_cost.activations_checkpointed_gib < 0.5 * sd15_cost.activations_gib
    assert sd15_cost.weights_gib < sd15_cost.total_checkpointed_gib < sd15_cost.total_gib < 12


def test_a_small_reference_costs_less(sd15_cost):
    small = cost("sd15", 512, 256)
    assert small.cache_mib == pytest.approx(sd15_cost.cache_mib / 4)
    assert small.fused == pytest.approx(sd15_cost.fused / 4, rel=0.01)
    assert small.forward == sd15_cost.forward


def test_the_table_has_a_row_per_layout(sd15_cost):
    lines = table([sd15_cost, sd15_cost]).splitlines()
    assert len(lines) == 4 and "sd15 @512, reference 512" in lines[2] and "24.78 M" in lines[2]
    assert len({line.count("|") for line in lines}) == 1


def test_the_benchmark_prints_speed_with_and_without_checkpointing(capsys):
    from training.benchmark import main

    assert main(["--family", "small", "--resolution", "64", "--steps", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "checkpointing" in lines[3]
    seconds, samples, gflop = (float(cell) for cell in lines[2].split("|")[2:5])
    assert seconds > 0 and samples == pytest.approx(1 / seconds, rel=0.2) and gflop > 0


def test_the_benchmark_prints_the_speed_of_prepare_per_core(tmp_path, capsys):
    from training.benchmark import main

    photos = kit.photo_folder(tmp_path / "photos", 5)
    overrides = [word for setting in kit.WITHOUT_FACES for word in ("--set", setting)]
    assert main(["--photos", str(photos), *overrides]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "img/s per core" in header
    found = {row.split("|")[1].strip(): [float(cell) for cell in row.split("|")[2:6]] for row in rows}
    assert {"scan", "faces", "select", "pack"} <= found.keys()
    assert found["scan"][0] == 5 and min(found["scan"][2:]) > 0
    assert list(tmp_path.iterdir()) == [photos]
    assert main(["--photos", str(tmp_path / "nowhere"), *overrides]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: peak memory of the whole SD1.5 UNet")
def test_the_whole_sd15_unet_trains_in_12_gb_on_a_gpu():
    from training.benchmark import measure

    common = {"batch": 1, "device": "cuda", "steps": 2, "dtype": torch.bfloat16}
    whole, checkpointed = (measure("sd15", 512, checkpointing=on, **common) for on in (False, True))
    assert 0 < checkpointed.peak_gib < whole.peak_gib < 12 * 1e9 / 2**30
