"""Exact resume, and independence of the number of processes (TRAINING 1.2)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import environment, free_port, settings, train_tiny

from training.checkpoint import WEIGHTS_FILE, checkpoints

SCRIPT = Path(__file__).with_name("tiny_run.py")


def start(tmp_path: Path, values: dict, *, launcher: tuple[str, ...] = (), **options: object) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(SCRIPT), json.dumps({"values": values, **options})]
    return subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen) -> int:
    output, _ = process.communicate(timeout=900)
    if process.returncode > 0:
        pytest.fail(output[-3000:])
    return process.returncode


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[-1] / WEIGHTS_FILE)


@pytest.mark.slow
def test_20_steps_equal_10_plus_kill_plus_resume_10_bit_for_bit(tiny_base, tmp_path):
    def values(run: str) -> dict:
        return settings(tiny_base, tmp_path / run, schedule__steps=20, checkpoint__every=10, ema__decay=0.99)

    whole = start(tmp_path, values("whole"))
    killed = start(tmp_path, values("parts"), kill_at=13)
    assert finished(whole) == 0
    assert finished(killed) == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "parts" / "checkpoints")] == ["step_00000010"]
    assert finished(start(tmp_path, values("parts"))) == 0
    for file in ("adapter.safetensors", f"checkpoints/step_00000020/{WEIGHTS_FILE}"):
        one, two = (load_file(tmp_path / run / file) for run in ("whole", "parts"))
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(one[name], two[name]), (file, name)


@pytest.mark.slow
def test_1_process_with_batch_4_equals_2_processes_with_batch_2(tiny_base, tmp_path):
    def values(run: str, batch: int) -> dict:
        changes = {"schedule__steps": 5, "schedule__batch_size": batch, "checkpoint__every": 5}
        # AdamW's first steps have the size lr whatever the gradient, so rounding would show as lr; eps makes it smooth.
        return settings(tiny_base, tmp_path / run, **changes, optimizer__eps=1e-3, drops={"face": 0.4, "text": 0.2})

    one = start(tmp_path, values("one", 4))
    assert finished(one) == 0
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    assert finished(start(tmp_path, values("two", 2), launcher=launcher)) == 0
    a, b = newest(tmp_path / "one"), newest(tmp_path / "two")
    initial = load_initial(tiny_base)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-6, rtol=0), (name, (a[name] - b[name]).abs().max())
        assert (a[name] - initial[name]).abs().max() > 1e-4, "the run must have moved the weights"


def load_initial(base: Path) -> dict[str, torch.Tensor]:
    from diffusers import UNet2DConditionModel

    from attention.adapter import AdapterSettings
    from training.unet import FusedUNet

    model = FusedUNet(UNet2DConditionModel.from_pretrained(base / "unet"), AdapterSettings(base="custom"))
    return {name: weight.detach() for name, weight in model.trainable()}


@contextmanager
def no_room(limit: int) -> Iterator[None]:
    """Every file that is written grows to `limit` bytes at most, then writing fails: what a full disk looks like."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_full_disk_while_writing_a_checkpoint_loses_nothing(limit, tiny_base, tmp_path, monkeypatch, caplog):
    from accelerate import Accelerator

    real = Accelerator.save_state

    def save_state(self, folder, **options):
        with no_room(limit) if "00000002" in folder else nullcontext():
            return real(self, folder, **options)

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    run = tmp_path / "run"
    path = train_tiny(settings(tiny_base, run, checkpoint__every=1, checkpoint__keep=9))
    assert path is not None and path.exists()
    assert "step_00000002 could not be written" in caplog.text
    names = sorted(entry.name for entry in (run / "checkpoints").iterdir())
    assert names == ["step_00000001", "step_00000003", "step_00000004"], "no half checkpoint may stay"


def test_a_full_disk_at_the_end_says_how_to_get_the_result(tiny_base, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    from training.fusion_task import FusionTask

    save, run = FusionTask.save, tmp_path / "run"

    def save_without_room(self, folder, weights, facts):
        with no_room(1000):
            return save(self, folder, weights, facts)

    with monkeypatch.context() as full:
        full.setattr(FusionTask, "save", save_without_room)
        with pytest.raises(ValueError, match=r"could not be written .* run the same command again"):
            train_tiny(settings(tiny_base, run))
    assert not list(run.glob("*adapter*")), "no half file may stay"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_tiny(settings(tiny_base, run)) == run / "adapter.safetensors"


def test_only_the_newest_checkpoints_are_kept_and_frozen_weights_are_not_in_them(tiny_base, tmp_path):
    run = tmp_path / "run"
    train_tiny(settings(tiny_base, run, checkpoint__every=1, checkpoint__keep=2))
    found = checkpoints(run / "checkpoints")
    assert [path.name for path in found] == ["step_00000003", "step_00000004"]
    assert {name.rsplit(".", 2)[1] for name in load_file(found[0] / WEIGHTS_FILE)} == {"to_k_face", "to_v_face"}
    assert not list(found[0].glob("model*")), "accelerate must not write the frozen UNet"


def test_an_unfinished_checkpoint_folder_is_ignored(tiny_base, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000099").mkdir(parents=True)
    assert checkpoints(run / "checkpoints") == []
    assert train_tiny(settings(tiny_base, run)) is not None


def test_a_run_is_not_resumed_on_other_data_or_when_told_never(tiny_base, tmp_path):
    from accelerate.state import AcceleratorState

    run = tmp_path / "run"
    train_tiny(settings(tiny_base, run, checkpoint__every=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"was trained with other data .*init_from"):
        train_tiny(settings(tiny_base, run, schedule__steps=6), num=6)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="has checkpoints"):
        train_tiny(settings(tiny_base, run, checkpoint__resume="never"))


def test_a_resumed_run_with_another_batch_goes_on_at_the_same_sample(tiny_base, tmp_path):
    from accelerate.state import AcceleratorState

    run = tmp_path / "run"
    train_tiny(settings(tiny_base, run, checkpoint__every=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="stands at sample 8, which is no multiple of the 3"):
        train_tiny(settings(tiny_base, run, schedule__batch_size=3))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_tiny(settings(tiny_base, run, schedule__batch_size=4, schedule__steps=3, checkpoint__every=3))
    state = json.loads((run / "checkpoints" / "step_00000003" / "train_state.json").read_text(encoding="utf-8"))
    assert state["position"] == 12
