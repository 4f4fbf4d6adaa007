"""The shipped configurations, and a launch over two machines, dry-run with one CPU process each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, environment, settings

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


def test_two_machines_train_together(tiny_base, tmp_path):
    run = tmp_path / "run"
    values = settings(tiny_base, run, schedule__steps=2, checkpoint__every=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launch += ["--master_addr=127.0.0.1", "--master_port=29623"]
    script = [str(Path(__file__).with_name("tiny_run.py")), json.dumps({"values": values})]
    machines = [
        subprocess.Popen(
            [*launch, f"--node_rank={rank}", *script],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [machine.communicate(timeout=240)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs[0][-2000:]
    last = checkpoints(run / "checkpoints")[-1]
    state = json.loads((last / "train_state.json").read_text(encoding="utf-8"))
    assert state["world_size"] == 2 and state["position"] == 8
    assert sorted(path.name for path in last.glob("random_states_*")) == ["random_states_0.pkl", "random_states_1.pkl"]
    assert (run / "adapter.safetensors").is_file()
