"""The training loop: promises about what changes, what does not, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_run import settings, train_tiny

from attention.adapter import load_adapter
from attention.files import read_header


def lines(run: Path, kind: str) -> list[dict]:
    text = (run / "log.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


@pytest.mark.parametrize("which", ["tiny_base", "tiny_base_xl"])
def test_a_run_ends_in_a_file_that_says_how_it_was_made(which, request, tmp_path):
    base, run = request.getfixturevalue(which), tmp_path / "run"
    path = train_tiny(settings(base, run, seed=3, model__license="CC0"))
    adapter = load_adapter(path)
    assert path == run / "adapter.safetensors"
    assert adapter.settings.samples_seen == 8 and adapter.settings.license == "CC0"
    assert adapter.settings.reference_size == 64 and adapter.settings.encoder == "drawn"
    assert len(adapter.settings.base_hash) == 64 and adapter.settings.base_checkpoint == base.name
    assert adapter.prompt_context.shape == (77, 64 if which == "tiny_base" else 128)
    assert (adapter.prompt_pooled is None) == (which == "tiny_base")
    metadata = read_header(path).metadata
    config = json.loads(metadata["fusedid.training_config"])
    assert config["seed"] == 3 and config["schedule"]["steps"] == 4
    assert str(tmp_path) not in json.dumps(metadata), "paths of the machine must not be published"
    assert config["model"]["base"] == base.name and config["run"] == "run"
    assert json.loads(metadata["fusedid.versions"])["torch"] == torch.__version__


def test_frozen_weights_are_bit_identical_before_and_after(tiny_base, tmp_path, monkeypatch):
    from training import train as module

    trainers = []
    set_up = module.Trainer.__init__

    def remember(self, *arguments):
        set_up(self, *arguments)
        self.before = {name: weight.clone() for name, weight in self.task.model.state_dict().items()}
        trainers.append(self)

    monkeypatch.setattr(module.Trainer, "__init__", remember)
    train_tiny(settings(tiny_base, tmp_path / "run"))
    (trainer,) = trainers
    changed = {
        name
        for name, weight in trainer.task.model.state_dict().items()
        if not torch.equal(weight, trainer.before[name])
    }
    trained = {name for name, _ in trainer.task.trainable()}
    assert changed == trained and len(trained) == 8
    assert all(name.endswith(("to_k_face.weight", "to_v_face.weight")) for name in trained)
    in_optimizer = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert in_optimizer == {id(weight) for _, weight in trainer.task.trainable()}


def test_a_non_finite_loss_stops_before_the_step_and_names_the_sample(tiny_base, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: steps.append(1))
    monkeypatch.setattr("training.data.to_rgb_pm1", lambda picture: torch.full((3, 64, 64), float("nan")))
    with pytest.raises(ValueError, match=r"step 0: the loss is not a finite number for sample p\d \(epoch 0, t \d+\)"):
        train_tiny(settings(tiny_base, tmp_path / "run", schedule__batch_size=1, drops={"face": 0, "both": 0}))
    assert steps == []
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_non_finite_gradient_stops_before_the_step(tiny_base, tmp_path, monkeypatch):
    from training.unet import FaceProjection

    forward, steps = FaceProjection.forward, []

    def with_bad_gradient(self, hidden):
        key, value = forward(self, hidden)
        key.register_hook(lambda gradient: gradient * float("inf"))
        return key, value

    monkeypatch.setattr(FaceProjection, "forward", with_bad_gradient)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: steps.append(1))
    with pytest.raises(ValueError, match=r"step 0: the gradient is not finite; the last samples were p\d, p\d"):
        train_tiny(settings(tiny_base, tmp_path / "run", drops={"face": 0, "both": 0}))
    assert steps == []


def test_validation_scores_the_same_noise_every_time(tiny_base, tmp_path):
    run = tmp_path / "run"
    train_tiny(settings(tiny_base, run, validation__every=1, optimizer__lr=1e-30, ema__decay=None))
    scores = lines(run, "validation")
    assert len(scores) == 4 and {"loss", "loss_t100", "loss_t900"} <= set(scores[0])
    assert scores[0]["loss_t900"] == scores[3]["loss_t900"] and scores[0]["loss_t100"] != scores[0]["loss_t900"]


def test_the_log_has_a_line_per_step_with_loss_norm_and_speed(tiny_base, tmp_path):
    run = tmp_path / "run"
    train_tiny(settings(tiny_base, run, schedule__warmup=2))
    train = lines(run, "train")
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    assert [line["lr"] for line in train] == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["samples_per_second"] > 0 for line in train)


def test_tensorboard_is_written_when_asked_for(tiny_base, tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    train_tiny(settings(tiny_base, run, log__trackers=["tensorboard"]))
    assert list(run.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"engine__checkpointing": True}, True),
        ({"data__workers": 2}, True),
        ({"schedule__batch_size": 1, "schedule__accumulation": 2}, True),
        ({"seed": 1}, False),
        ({"reference__timestep": "matched"}, False),
        ({"reference__text": "positive"}, False),
        ({"reference__combine": "decoupled"}, False),
        ({"data__latents": "cached"}, False),
        ({"data__pair_mode": "other"}, False),
    ],
)
def test_settings_that_may_and_may_not_change_the_result(changes, same, tiny_base, tmp_path):
    # AdamW's first steps have the size lr whatever the gradient; eps keeps the rounding of a tiny one small.
    always = {"drops": {"face": 0, "text": 0, "both": 0}, "optimizer__eps": 1e-5}
    one = train_tiny(settings(tiny_base, tmp_path / "one", **always))
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    two = train_tiny(settings(tiny_base, tmp_path / "two", **always, **changes))
    a, b = load_adapter(one).projections, load_adapter(two).projections
    close = [torch.allclose(a[site].value, b[site].value, atol=1e-4, rtol=2e-3) for site in a]
    assert all(close) if same else not all(close)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
def test_compiled_blocks_train_the_same(tmp_path):
    from accelerate.state import AcceleratorState

    base = tiny_models.write_base(tmp_path / "base", widths=(32, 32))
    always = {"drops": {"face": 0, "text": 0, "both": 0}, "validation__samples": 0, "schedule__steps": 2}
    losses = []
    for compiled in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_tiny(settings(base, tmp_path / str(compiled), engine__compile=compiled, **always))
        losses.append([line["loss"] for line in lines(tmp_path / str(compiled), "train")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_run_starts_from_an_earlier_file(tiny_base, tiny_base_xl, tmp_path):
    first = train_tiny(settings(tiny_base, tmp_path / "one"))
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    again = settings(tiny_base, tmp_path / "two", checkpoint__init_from=str(first), optimizer__lr=1e-12)
    second = train_tiny(again)
    a, b = load_adapter(first).projections, load_adapter(second).projections
    assert all(torch.allclose(a[site].key.float(), b[site].key.float(), atol=2e-3) for site in a)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"adapter\.safetensors does not fit this model"):
        train_tiny(settings(tiny_base_xl, tmp_path / "three", checkpoint__init_from=str(first)))


@pytest.mark.parametrize("method", ["fusion", "guidance"])
def test_half_precision_trains_close_to_full(method, tiny_base, tmp_path):
    from accelerate.state import AcceleratorState

    losses = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = tmp_path / precision
        extra = {"method": method, "guidance__towers": [{"name": "T", "width": 12}], "guidance__train": "lora"}
        path = train_tiny(settings(tiny_base, run, engine__precision=precision, **extra))
        losses[precision] = [line["loss"] for line in lines(run, "train")]
        assert read_header(path).metadata["fusedid.format"] == "1"
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"], "the arithmetic must really be in half precision"


def test_validation_pictures_are_drawn(tiny_base, tmp_path):
    from PIL import Image

    run = tmp_path / "run"
    options = {"pictures": 2, "picture_steps": 2, "every": 4, "samples": 1}
    train_tiny(settings(tiny_base, run, validation=options, engine__precision="bf16"))
    assert Image.open(run / "pictures" / "step_00000004.png").size == (128, 128)
