"""A training run: set up once, then one loop for both methods; variants are values in the configuration.

accelerate is the engine: one process, DDP, FSDP and DeepSpeed differ only in how the command is launched. All
randomness comes from `randomness`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from torch import Tensor

from .checkpoint import TrainState, checkpoints, keep_frozen_weights_out, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .config_io import config_hash
from .data import Sample, StreamDataset, loader
from .ema import Ema
from .log import RunLog
from .optimizer import make_optimizer, set_lr
from .randomness import batches
from .result import run_facts, versions
from .schedule import lr_factor
from .source import Source
from .task import Task
from .tasks import open_task
from .validation import on_device, validation_losses

logger = logging.getLogger("fusedid")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Sources = tuple[Source, Source | None]
"""Training data, and validation data where there is any."""


class Trainer:
    """A run: everything set up once, then `run`."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, sources: Sources) -> None:
        self.config = config
        self.accelerator = accelerator
        self.folder = Path(config.run).expanduser()
        self.train_source, self.val_source = sources
        self.task: Task = open_task(config, self.train_source)
        self._set_up_task()
        parameters = [weight for _, weight in self.task.trainable()]
        self.ema = Ema(parameters, config.ema.decay)
        optimizer = make_optimizer(parameters, config)
        self.model, self.optimizer = accelerator.prepare(self.task.model, optimizer)
        keep_frozen_weights_out(accelerator, self.task)
        accelerator.register_for_checkpointing(self.ema)
        self.log = RunLog(accelerator, self.folder)
        self.step = 0

    def _set_up_task(self) -> None:
        config, sharded = self.config, _shards_weights(self.accelerator)
        if sharded and config.ema.decay is not None:
            raise ValueError("ema.decay needs whole weights on every GPU; set ema.decay=null for FSDP and DeepSpeed")
        if config.checkpoint.init_from is not None:
            self.task.load(Path(config.checkpoint.init_from).expanduser())
        self.task.to_device(self.accelerator.device, PRECISIONS[config.engine.precision])
        if config.engine.checkpointing:
            self.task.enable_checkpointing()
        if config.engine.compile:
            self.task.compile()
        self.task.model.train()

    @property
    def samples_per_step(self) -> int:
        """Samples that one optimizer step sees, over all processes."""
        schedule = self.config.schedule
        return schedule.batch_size * schedule.accumulation * self.accelerator.num_processes

    def state(self) -> TrainState:
        """Where the run stands now."""
        return TrainState(
            step=self.step,
            position=self.step * self.samples_per_step,
            config_hash=config_hash(self.config),
            data_fingerprint=self.train_source.fingerprint,
            method=self.config.method,
            world_size=self.accelerator.num_processes,
            versions=versions(),
        )

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> Path | None:
        """Trains to the last step; returns the output file (None on processes other than the main one)."""
        self.resume()
        stream = self.forward_passes()
        started, first = time.perf_counter(), self.step
        while self.step < self.config.schedule.steps:
            set_lr(self.optimizer, self.config.peak_lr * lr_factor(self.step, self.config.schedule))
            loss, norm = self.train_step(stream)
            self.step += 1
            self.ema.update()
            if self.due(self.config.log.every):
                speed = (self.step - first) * self.samples_per_step / (time.perf_counter() - started)
                self.log_step(loss, norm, speed)
            if self.due(self.config.validation.every):
                self.validate()
            if self.due(self.config.checkpoint.every):
                self.save()
        return self.finish()

    def train_step(self, stream: Iterator[Sample]) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this process's mean loss and the gradient norm. Stops before a bad step."""
        total = torch.zeros((), device=self.accelerator.device)
        norm = torch.zeros(())
        for _ in range(self.config.schedule.accumulation):
            batch = on_device(next(stream), self.accelerator.device)
            with self.accelerator.accumulate(self.model):
                losses = self.task.losses(self.model, batch)
                require_finite_loss(losses, batch, self.step)
                self.accelerator.backward(losses.mean())
                if self.accelerator.sync_gradients:
                    norm = self.clipped_norm(batch)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += losses.detach().mean() / self.config.schedule.accumulation
        return total, norm

    def clipped_norm(self, batch: Sample) -> Tensor:
        """Scales the gradients down; raises ValueError when they are not finite (in fp16 the scaler skips the step)."""
        limit = self.config.optimizer.max_grad_norm
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))
        if self.config.engine.precision != "fp16" and not bool(torch.isfinite(norm)):
            raise ValueError(
                f"step {self.step}: the gradient is not finite; the last samples were {', '.join(batch['key'])}. No "
                "weight was changed; lower optimizer.lr or use engine.precision=fp32, then run the same command again"
            )
        return norm

    def forward_passes(self) -> Iterator[Sample]:
        """This process's batches from the current step to the last."""
        schedule = self.config.schedule
        positions = batches(
            start_step=self.step,
            stop_step=schedule.steps,
            batch=schedule.batch_size,
            accumulation=schedule.accumulation,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        dataset = StreamDataset(self.train_source, self.task.draw, self.config.seed)
        return iter(loader(dataset, positions, workers=self.config.data.workers))

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step always counts."""
        return self.step % every == 0 or self.step == self.config.schedule.steps

    # ---- around the loop ------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continues from the newest checkpoint, if there is one."""
        found = checkpoints(self.folder / "checkpoints")
        if not found:
            return
        if self.config.checkpoint.resume == "never":
            raise ValueError(
                f"{self.folder} already has checkpoints; choose another run folder or checkpoint.resume=auto"
            )
        state = load_checkpoint(self.accelerator, found[-1], self.state())
        if state.position % self.samples_per_step:
            raise ValueError(
                f"{found[-1].name} stands at sample {state.position}, which is no multiple of the "
                f"{self.samples_per_step} samples per step now. Choose batch_size, accumulation and processes "
                "so that their product divides it"
            )
        self.step = state.position // self.samples_per_step
        self.log.write(self.step, "resume", {"checkpoint": found[-1].name, "position": state.position})

    def log_step(self, loss: Tensor, norm: Tensor, speed: float) -> None:
        """One line per `log.every` steps."""
        mean = self.accelerator.reduce(loss, "mean")
        values = {
            "loss": float(mean),
            "grad_norm": float(norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": round(speed, 3),
        }
        if self.accelerator.device.type == "cuda":
            values["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.log.write(self.step, "train", values)
        if self.accelerator.is_main_process:
            left = (self.config.schedule.steps - self.step) * self.samples_per_step / max(speed, 1e-9)
            logger.info(
                "step %d of %d, loss %.4f, %.2f samples/s, %s left",
                self.step,
                self.config.schedule.steps,
                values["loss"],
                speed,
                timedelta(seconds=round(left)),
            )

    def validate(self) -> None:
        """Validation losses and pictures of the averaged weights, when there is a validation split."""
        if self.val_source is None or self.config.validation.samples == 0:
            return
        with self.ema.swapped_in():
            losses = validation_losses(self.accelerator, self.task, self.model, self.val_source, self.config)
            scores = self.draw_pictures(self.val_source) if self.config.validation.pictures else {}
        self.log.write(self.step, "validation", {**losses, **scores})

    def draw_pictures(self, source: Source) -> dict[str, float]:
        """Validation pictures from the main process while the others wait; not where weights are spread over GPUs."""
        scores = {}
        if self.accelerator.is_main_process and not _shards_weights(self.accelerator):
            self.task.model.eval()
            scores = self.task.pictures(source, self.folder / "pictures" / f"step_{self.step:08d}.png")
            self.task.model.train()
        self.accelerator.wait_for_everyone()
        return scores

    def save(self) -> None:
        """A checkpoint."""
        path = save_checkpoint(
            self.accelerator, self.folder / "checkpoints", self.state(), keep=self.config.checkpoint.keep
        )
        self.log.write(self.step, "checkpoint", {"path": path.name if path else "failed"})

    def finish(self) -> Path | None:
        """Writes the output file from the averaged weights and closes the trackers."""
        with self.ema.swapped_in():
            weights = self.accelerator.get_state_dict(self.model)
            path = None
            if self.accelerator.is_main_process:
                path = self.write_result(weights)
                self.log.write(self.step, "result", {"file": path.name})
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return path

    def write_result(self, weights: Mapping[str, Tensor]) -> Path:
        """The output file. Raises ValueError when it cannot be written; nothing is lost then."""
        facts = run_facts(self.config, self.state(), self.train_source)
        try:
            return self.task.save(self.folder, weights, facts)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"the result could not be written to {self.folder} ({error}). Free space and run the same command "
                "again: it takes the newest checkpoint and only writes the file"
            ) from error


def _shards_weights(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def require_finite_loss(losses: Tensor, batch: Sample, step: int) -> None:
    """Raises ValueError naming the samples, before their gradients reach any weight."""
    finite = torch.isfinite(losses.detach()).tolist()
    bad = [
        f"{key} (epoch {epoch}, t {int(t)})"
        for key, epoch, t, fine in zip(batch["key"], batch["epoch"], batch["timestep"], finite)
        if not fine
    ]
    if bad:
        raise ValueError(
            f"step {step}: the loss is not a finite number for sample {', '.join(bad)}. No weight was changed by it; "
            "look at that picture, lower optimizer.lr, or use engine.precision=bf16 or fp32, then run the same command "
            "to resume"
        )
