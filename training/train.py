"""`python -m training.train --config run.yaml`: from a prepared data set to the file the node loads."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from .config import TrainConfig
from .config_io import config_hash, dump_yaml, load_config
from .config_table import settings_table
from .log import tracker_names
from .tasks import open_sources
from .trainer import Sources, Trainer

logger = logging.getLogger("fusedid")
MIXED = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The engine for this configuration, in whatever world the process was launched."""
    accelerator = Accelerator(
        cpu=config.engine.device == "cpu",
        mixed_precision=MIXED[config.engine.precision],
        gradient_accumulation_steps=config.schedule.accumulation,
        log_with=tracker_names(config.log) or None,
        project_dir=config.run,
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.schedule.batch_size
        if accelerator.gradient_accumulation_steps != config.schedule.accumulation:
            raise ValueError(
                f"the DeepSpeed configuration accumulates {accelerator.gradient_accumulation_steps} passes, "
                f"schedule.accumulation says {config.schedule.accumulation}; set both to the same number"
            )
    return accelerator


def train(config: TrainConfig, sources: Sources | None = None) -> Path | None:
    """Runs a configuration to its end, on `sources` or on what `data.root` holds.

    Raises ValueError for anything the user can put right.
    """
    accelerator = make_accelerator(config)
    folder = Path(config.run).expanduser()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("fusedid", config={"config_hash": config_hash(config), "method": config.method})
    return Trainer(config, accelerator, sources or open_sources(config)).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--config", help="YAML file; see training/configs/fusion.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--settings", action="store_true", help="print every setting as a Markdown table and stop")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if options.settings:
        sys.stdout.write(settings_table(TrainConfig))
        return 0
    try:
        train(load_config(TrainConfig, options.config, options.set))
    except ValueError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.error("stopped; run the same command to go on from the newest checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
