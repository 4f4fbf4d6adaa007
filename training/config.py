"""Every setting of a training run, with its unit and bounds. Unknown keys are refused; the whole is saved with the run.

Defaults marked [paper] are the papers'; the others are this project's decisions (METHOD 1.5, 2.5; papers give none).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from attention.grid import LATENT_SCALE

from .config_io import Config


class ModelConfig(Config):
    base: str = ""
    """Base model: a diffusers folder, or one `.safetensors` checkpoint of SD1.5 or SDXL."""
    family: Literal["auto", "sd15", "sd20", "sdxl", "custom"] = "auto"
    """What `base` must be; a run refuses to start on anything else. `auto` takes what is there."""
    config: str | None = None
    """For a `.safetensors` base without network: a diffusers folder of the same kind, for its config files."""
    vae: str | None = None
    """Another VAE: a diffusers folder with an AutoencoderKL. It always runs in fp32."""
    license: str = ""
    """Licence of the weights you train, written into the file (for example CreativeML-OpenRAIL-M)."""


class AugmentConfig(Config):
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring the target, and independently the reference."""
    crop: float = Field(default=0.08, ge=0, le=0.5)
    """The reference is cut by up to this share of its side, at a random place, and scaled back."""
    color: float = Field(default=0.1, ge=0, le=0.5)
    """Largest change of the reference's brightness, contrast and saturation."""


class DataConfig(Config):
    root: str = ""
    """Folder or fsspec URL that `python -m training.prepare` wrote."""
    resolution: int = Field(default=512, ge=64, le=2048, multiple_of=64)
    """Side of the square target in pixels (1024 for SDXL)."""
    pair_mode: Literal["same", "other", "mixed"] = "mixed"
    """Reference from the target's own picture (`same`), from another picture of that person where there is one
    (`other`), or either with equal chance (`mixed`)."""
    latents: Literal["encode", "cached"] = "encode"
    """`cached` takes the VAE moments that prepare stored: faster, and without augmentation."""
    workers: int = Field(default=4, ge=0)
    """Loader processes per training process. The result does not depend on it."""
    augment: AugmentConfig = AugmentConfig()
    variants: int | None = Field(default=None, ge=1)
    """null: every epoch augments a picture anew. With a number each picture has so many augmentations and no more, and
    their latents are kept in memory: for small data sets, where encoding would cost more than the UNet."""


class ReferenceConfig(Config):
    size: int = Field(default=512, ge=64, le=2048, multiple_of=64)
    """Side of the square face reference in pixels."""
    timestep: Literal["clean", "matched"] = "clean"
    """`clean`: at t = 0, cacheable in inference. `matched`: noised to the target's t, one more UNet row per step."""
    text: Literal["empty", "positive"] = "empty"
    """Prompt of the reference pass."""
    remember: bool = False
    """Keep what the reference pass gives in memory (22 MiB per picture and variant for SD1.5 at 512 px) and do
    not repeat it every epoch. Needs `data.variants` and a pass that never changes: clean, with the empty prompt."""
    length: Literal["balanced", "paper"] = "balanced"
    """Length term of METHOD 1.1."""
    combine: Literal["fused", "decoupled"] = "fused"
    """One softmax [paper], or two as IP-Adapter."""


class DropConfig(Config):
    face: float = Field(default=0.05, ge=0, le=1)
    """Share of samples trained without the face."""
    text: float = Field(default=0.05, ge=0, le=1)
    """Share trained with the empty prompt."""
    both: float = Field(default=0.05, ge=0, le=1)
    """Share trained without either."""

    @model_validator(mode="after")
    def _at_most_all(self) -> DropConfig:
        total = self.face + self.text + self.both
        if total > 1:
            raise ValueError(f"face + text + both must be at most 1, they are {total:g}")
        return self


class LoraConfig(Config):
    rank: int = Field(default=64, ge=1)
    """Rank of the LoRA on to_q, to_k, to_v and to_out of every attention."""
    alpha: int = Field(default=64, ge=1)
    """The LoRA acts with alpha / rank."""


class TowerConfig(Config):
    name: str
    """As the node knows it: `ViT-L/14`, `RN101`, `ViT-B/32`."""
    width: int = Field(ge=1)
    """Numbers in its projected embedding: 768, 512, 512."""
    path: str | None = None
    """A transformers CLIP folder, or `open_clip:<model>/<weights>` such as `open_clip:RN101/openai`. null: the columns
    that prepare cached (`cache.clip_vision`, same order); then it must be null for every tower."""


class GuidanceConfig(Config):
    towers: tuple[TowerConfig, ...] = (TowerConfig(name="ViT-L/14", width=768),)
    """CLIP vision towers in the order of the Linear's columns. The paper: ViT-L/14, RN101 and ViT-B/32."""
    tokens: int = Field(default=4, ge=1, le=1024)
    """Guidance tokens. 1 is the paper; with 1 cross-attention is constant over the image."""
    face_normalisation: Literal["unit", "raw"] = "unit"
    """Face embeddings at unit length, or as the recogniser gave them."""
    style_normalisation: Literal["unit", "raw"] = "raw"
    """CLIP embeddings as they are, or every tower's at unit length."""
    style_drop: float = Field(default=0.64, ge=0, le=1)
    """Share of samples trained without the style [paper]. 1 trains the face alone: no tower and no cache is read."""
    face_drop: float = Field(default=0.1, ge=0, le=1)
    """Share trained without the face [paper], independent of `style_drop`."""
    train: Literal["full", "lora"] = "full"
    """The whole UNet [paper], or a LoRA on its attention, small enough to share."""
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _one_source(self) -> GuidanceConfig:
        if not self.towers:
            raise ValueError("towers is empty; name at least one CLIP vision tower")
        if len({tower.path is None for tower in self.towers}) > 1:
            raise ValueError("either every tower has a path, or none has and the cached embeddings are used")
        return self

    @property
    def cached(self) -> bool:
        """Whether the style embeddings come from prepare's cache."""
        return self.reads_style and self.towers[0].path is None

    @property
    def reads_style(self) -> bool:
        """Whether any sample has a style."""
        return self.style_drop < 1


class AutoencoderConfig(Config):
    crop: int | None = Field(default=None, ge=32, multiple_of=8)
    """Side of the random squares it learns from, in pixels; null takes whole pictures."""
    noise: float = Field(default=0.1, ge=0, le=1)
    """Standard deviation of the noise on the latents before decoding."""
    edges: float = Field(default=1.0, ge=0)
    """Weight of the error in differences between neighbouring pixels, beside the pixels' own."""
    latents: float = Field(default=0.1, ge=0)
    """Weight that holds the latents at zero mean and unit variance per channel."""


class DenoiserConfig(Config):
    condition: Literal["text", "thumbnail"] = "text"
    """`thumbnail`: instead of text the cross-attention is given a thumbnail of the picture, 8 to 32 pixels wide. For
    models without a text encoder, whose cross-attention would learn nothing, and an adapter would find no use for."""
    drop: float = Field(default=0.3, ge=0, le=1)
    """Share of samples without the thumbnail: the unconditional model, which is the one that is used."""
    people: tuple[int, ...] = Field(default=(1,), min_length=1)
    """People side by side in a picture, each from a sample of its own; each step takes one of these at random. The
    batch size must be a multiple of each. More than 1 needs thumbnails."""

    @field_validator("people")
    @classmethod
    def _positive(cls, people: tuple[int, ...]) -> tuple[int, ...]:
        if min(people) < 1:
            raise ValueError("every number of people must be at least 1")
        return people

    @model_validator(mode="after")
    def _told_apart(self) -> DenoiserConfig:
        if max(self.people) > 1 and self.condition != "thumbnail":
            raise ValueError("people above 1 needs condition: thumbnail; with text nobody can be told apart")
        return self


class OptimizerConfig(Config):
    name: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` needs `pip install bitsandbytes` and a GPU."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; null is 1e-6 [paper] for `guidance`, else 1e-4. Never scaled by GPU count."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decay of the trained weights, relative to the learning rate."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's term against division by zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""


class ScheduleConfig(Config):
    steps: int = Field(default=80_000, ge=1)
    """Optimizer steps of the whole run."""
    warmup: int = Field(default=1000, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or a half cosine to zero at the last step."""
    batch_size: int = Field(default=1, ge=1)
    """Samples per process and forward pass. Samples per step = batch_size * processes * accumulation."""
    accumulation: int = Field(default=1, ge=1)
    """Forward and backward passes per optimizer step."""
    timesteps: Literal["uniform", "noisy"] = "uniform"
    """How t is drawn: every t alike [paper], or the larger of two draws: more often near pure noise, where it is
    decided whose face it will be."""


class EngineConfig(Config):
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    """Of the frozen weights and the arithmetic; trained weights and optimizer stay fp32."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """torch.compile of the repeated blocks (regional); needs a C++ compiler."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the GPU that the launcher gives the process."""


class EmaConfig(Config):
    decay: float | None = Field(default=0.9999, ge=0, lt=1)
    """Decay of the averaged weights, which the output file holds; null turns averaging off."""


class CheckpointConfig(Config):
    every: int = Field(default=1000, ge=1)
    """Optimizer steps between checkpoints."""
    keep: int = Field(default=3, ge=1)
    """Older checkpoints beyond this number are removed."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest checkpoint in the run folder; `never` refuses a folder that has one."""
    init_from: str | None = None
    """An adapter or guidance file to start the weights from."""


class ValidationConfig(Config):
    every: int = Field(default=1000, ge=1)
    """Optimizer steps between validations."""
    samples: int = Field(default=32, ge=0)
    """Pictures of the `val` split that are scored; 0 turns validation off."""
    timesteps: tuple[int, ...] = (50, 250, 500, 750, 950)
    """Each sample is scored at each of these t (0 to 999) with noise that never changes."""
    pictures: int = Field(default=0, ge=0)
    """Pictures drawn per validation, with the identity score when `face_pack` is given."""
    picture_steps: int = Field(default=25, ge=1)
    """Sampling steps of these pictures (Euler ancestral)."""
    face_pack: str | None = None
    """Face pack that scores the pictures, e.g. `buffalo_l`; null: no score."""
    face_roots: tuple[str, ...] = ("models/insightface", "~/.insightface")
    """Folders in which `models/<pack>` is looked for."""

    @model_validator(mode="after")
    def _timesteps_exist(self) -> ValidationConfig:
        if any(not 0 <= t < 1000 for t in self.timesteps):
            raise ValueError(f"timesteps must lie in 0 to 999, got {list(self.timesteps)}")
        return self


class LogConfig(Config):
    every: int = Field(default=10, ge=1)
    """Optimizer steps between lines of `log.jsonl`."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] | None = None
    """null: tensorboard when it is installed. `log.jsonl` is always written."""


class TrainConfig(Config):
    """The whole run."""

    config_version: Literal[1] = 1
    """Version of this list of settings."""
    method: Literal["fusion", "guidance", "denoiser", "autoencoder"] = "fusion"
    """`fusion`: METHOD 1 (trains the face projections). `guidance`: METHOD 2 (trains the Linear and the UNet).
    `denoiser` and `autoencoder` make a base model from nothing, as the miniature's: the UNet, and before it the VAE."""
    run: str = "runs/fusion"
    """Folder of this run: log, checkpoints, pictures, and the result."""
    seed: int = 0
    """Decides every random choice of the run."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reference: ReferenceConfig = ReferenceConfig()
    drops: DropConfig = DropConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _whole_pictures(self) -> TrainConfig:
        if self.denoiser.condition == "thumbnail" and self.data.latents == "cached":
            raise ValueError("denoiser.condition=thumbnail is made from the pictures; set data.latents to encode")
        for people in self.denoiser.people:
            if self.schedule.batch_size % people:
                raise ValueError(f"schedule.batch_size ({self.schedule.batch_size}) is no multiple of {people} people")
        return self

    @model_validator(mode="after")
    def _complete(self) -> TrainConfig:
        for name, value in (("model.base", self.model.base), ("data.root", self.data.root)):
            if not value:
                raise ValueError(f"{name} is not set; give it in the file or with --set {name}=...")
        fixed = self.data.variants is not None and (self.reference.timestep, self.reference.text) == ("clean", "empty")
        if self.reference.remember and not fixed:
            raise ValueError(
                "reference.remember needs data.variants, reference.timestep=clean and reference.text=empty"
            )
        if self.schedule.warmup > self.schedule.steps:
            raise ValueError(f"schedule.warmup ({self.schedule.warmup}) is longer than schedule.steps")
        return self

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        default = 1e-6 if self.method == "guidance" else 1e-4
        return default if self.optimizer.lr is None else self.optimizer.lr

    @property
    def latent_size(self) -> int:
        """Side of the target's latent."""
        return self.data.resolution // LATENT_SCALE


def without_chance(config: TrainConfig) -> TrainConfig:
    """The same run with nothing dropped and nothing augmented, for validation."""
    plain = config.data.model_copy(update={"augment": AugmentConfig(flip=0, crop=0, color=0)})
    kept = {"face_drop": 0.0, **({"style_drop": 0.0} if config.guidance.reads_style else {})}
    guidance = config.guidance.model_copy(update=kept)
    return config.model_copy(update={"data": plain, "drops": DropConfig(face=0, text=0, both=0), "guidance": guidance})
