"""The shipped configurations and launch files, dry-run with two CPU processes on one machine and on two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import prepare_kit as kit
import pytest
from tiny_run import ROOT, environment, free_port, settings

from training.checkpoint import checkpoints
from training.config import TrainConfig
from training.config_io import load_config

CONFIGS = ROOT / "training" / "configs"
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("prepare"))
LAUNCHES = sorted((CONFIGS / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_is_a_valid_configuration(path):
    config = load_config(TrainConfig, path, ["model.base=sd15", "data.root=prepared"])
    assert config.run == f"runs/{path.stem}"
    assert config.model.family in path.stem
    with pytest.raises(ValueError, match=r"model\.base is not set"):
        load_config(TrainConfig, path)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_every_shipped_launch_is_accepted_by_accelerate(path, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "training.train"])
    arguments, _, _ = _validate_launch_command(arguments)
    sharded = {"fsdp": (True, False), "deepspeed": (False, True)}.get(path.stem, (False, False))
    assert (arguments.use_fsdp, arguments.use_deepspeed) == sharded
    assert arguments.num_processes == {"one_gpu": 1, "several_nodes": 16}.get(path.stem, 8)
    assert arguments.num_machines == (2 if path.stem == "several_nodes" else 1)
    assert arguments.module and arguments.training_script == "training.train"


def dry_run(launch: str, machines: int, values: dict, tmp_path: Path) -> list[tuple[int, str]]:
    """`accelerate launch` with a shipped file, without GPUs: two processes in all. Exit status and output of each."""
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "accelerate" / launch),
    ]
    command += ["--num_processes", "2", "--main_process_port", str(free_port())]
    started = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), "-m", "training.train", "--config", str(config)],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(machines)
    ]
    outputs = [machine.communicate(timeout=900)[0] for machine in started]
    return [(machine.returncode, output) for machine, output in zip(started, outputs)]


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "machines"), [("eight_gpus.yaml", 1), ("several_nodes.yaml", 2)])
def test_shipped_launch_files_train_with_two_processes(launch, machines, tiny_base, tmp_path):
    kit.run(kit.photo_folder(tmp_path / "photos", 6), tmp_path / "data", "split.by=none")
    run = tmp_path / "run"
    values = settings(tiny_base, run, schedule__steps=2, data__root=str(tmp_path / "data"))
    for status, output in dry_run(launch, machines, values, tmp_path):
        assert status == 0, output[-2000:]
    last = checkpoints(run / "checkpoints")[-1]
    state = json.loads((last / "train_state.json").read_text(encoding="utf-8"))
    assert state["world_size"] == 2 and state["position"] == 8
    assert sorted(path.name for path in last.glob("random_states_*")) == ["random_states_0.pkl", "random_states_1.pkl"]
    assert (run / "adapter.safetensors").is_file()
