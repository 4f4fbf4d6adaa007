"""Every setting of an evaluation (a protocol), with its unit and bounds. Unknown keys are refused."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from training.config import ModelConfig
from training.config_io import Config

WITHOUT, TRAINING_FREE, THROUGH_VAE = "none", "training-free", "vae"
"""What stands for an adapter without being a file: no identity, the base's own attention, the reference itself."""
NO_FILE = (WITHOUT, TRAINING_FREE, THROUGH_VAE)
CAPTION = "{caption}"
"""Stands in a prompt for the person's caption in a prepared data set."""


class PeopleConfig(Config):
    photos: str | None = None
    """Folder with one sub-folder of photos per person, or with one photo per person."""
    data: str | None = None
    """Or: folder that `python -m training.prepare` wrote."""
    split: Literal["train", "val", "test", "all"] = "val"
    """Split of the prepared data set."""
    count: int = Field(default=16, ge=0)
    """How many people are drawn; 0 is all of them. The first ones, by name or in the data set's order."""
    held_out: bool = True
    """Of everyone with at least two photos, keep the last one unseen, to compare the pictures with."""
    margin: float = Field(default=0.3, ge=0, le=2)
    """Cut around a face found in `photos`, as a share of its box on each side. Use the margin the adapter was trained
    with (`crops.reference_margin` of prepare). Crops of a prepared data set are shown as they are."""


class ScorerConfig(Config):
    face_pack: str = "buffalo_l"
    """Face pack that judges. Choose another one than guided the pictures: a guiding encoder flatters."""
    face_roots: tuple[str, ...] = ("models/insightface", "../../models/insightface", "~/.insightface")
    """Folders in which `models/<pack>` is looked for."""
    strangers: int = Field(default=32, ge=0)
    """How many people outside a picture the leakage is compared with; 0 measures no leakage."""
    clip: str | None = None
    """transformers CLIP folder (vision and text) for the CLIP score; null: not measured."""
    deepface_python: str | None = None
    """Interpreter that has `deepface` installed, for the paper's three networks; null: not measured."""
    deepface_networks: tuple[str, ...] = ("VGG-Face", "Facenet512", "ArcFace")
    """Networks by deepface's names."""


class DrawConfig(Config):
    prompts: tuple[str, ...] = Field(default=("a portrait photo of a person",), min_length=1)
    """Each person is drawn with each prompt. `{caption}` stands for the person's caption in the prepared data set."""
    negative: str = ""
    """Negative prompt; without effect at a guidance_scale of 1."""
    seeds: int = Field(default=2, ge=1, lt=1000)
    """Pictures per person and prompt. All rows see the same noise."""
    seed: int = Field(default=0, ge=0)
    """First seed of all rows that have none of their own."""
    width: int = Field(default=512, ge=64, le=4096, multiple_of=8)
    """Pixels."""
    height: int = Field(default=512, ge=64, le=4096, multiple_of=8)
    """Pixels."""
    steps: int = Field(default=25, ge=1)
    """Sampling steps (Euler ancestral)."""
    guidance_scale: float = Field(default=7.0, ge=1)
    """Classifier-free guidance; 1 is without, at half the cost."""
    reference_size: int = Field(default=512, ge=64, le=2048, multiple_of=64)
    """Side of the references where no adapter file says it (training-free), pixels."""
    batch: int = Field(default=4, ge=1)
    """Pictures drawn together. Changes speed and memory, and the pictures only by rounding."""


class RowConfig(Config):
    """One line of the result: how its pictures are made. null: as the adapter was trained, or as `draw` says."""

    adapter: str = WITHOUT
    """Adapter file (relative paths: below --weights, where given), `none` (the base without identity), `training-free`,
    or `vae` (the reference itself through the VAE: the most a picture of this size can reach)."""
    pictures: str | None = None
    """Instead of drawing: folder with one sub-folder per person of pictures drawn elsewhere."""
    references: int = Field(default=1, ge=1, le=64)
    """Reference photos per person. Who has fewer gets changed crops (flip, cut, colour) of the same ones."""
    people: int = Field(default=1, ge=1, le=4)
    """People per picture."""
    routed: bool = True
    """With several people: each one's face is seen in an upright band of the picture only, or (false) everywhere."""
    wrong_person: bool = False
    """Control: the next person's references are shown, and the picture is scored against the person it stands for."""
    strength: float = Field(default=1.0, ge=0, le=10)
    """Factor on the face keys' share of the softmax: 0 is the base model, 1 the paper. On a base without text nothing
    competes with them, and it changes little."""
    value_strength: float = Field(default=1.0, ge=0, le=10)
    """Factor on the face values, 1 the paper."""
    combine: Literal["fused", "decoupled"] | None = None
    """One softmax or two."""
    timestep: Literal["clean", "matched"] | None = None
    """Reference pass at t = 0, or noised to each step."""
    length: Literal["balanced", "paper"] | None = None
    """Length term of the face keys."""
    prompts: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Other prompts than `draw.prompts`."""
    width: int | None = Field(default=None, ge=64, le=4096, multiple_of=8)
    """Pixels."""
    height: int | None = Field(default=None, ge=64, le=4096, multiple_of=8)
    """Pixels."""
    seed: int | None = Field(default=None, ge=0)
    """First seed of this row."""

    @property
    def shows_faces(self) -> bool:
        """Whether the UNet sees references in this row."""
        return self.pictures is None and self.adapter not in (WITHOUT, THROUGH_VAE) and self.strength > 0

    @model_validator(mode="after")
    def _one_person_without_drawing(self) -> RowConfig:
        if self.people > 1 and (self.pictures is not None or self.adapter == THROUGH_VAE):
            raise ValueError("`pictures` and the adapter `vae` stand for one person per picture; set people to 1")
        return self


class TimingConfig(Config):
    row: str | None = None
    """Row whose adapter is timed; null: nothing is timed."""
    references: tuple[int, ...] = Field(default=(1, 2, 4), min_length=2)
    """Numbers N of references to time."""
    repeats: int = Field(default=3, ge=1)
    """Pictures per number; one more is drawn before and not counted."""


class BootstrapConfig(Config):
    resamples: int = Field(default=2000, ge=100)
    """How often the people are drawn anew, with replacement."""
    seed: int = Field(default=0, ge=0)
    """Decides those draws."""


class Protocol(Config):
    """The whole evaluation."""

    config_version: Literal[1] = 1
    """Version of this list of settings."""
    name: str = "evaluation"
    """Title of the report."""
    model: ModelConfig = ModelConfig()
    people: PeopleConfig = PeopleConfig()
    scorer: ScorerConfig = ScorerConfig()
    draw: DrawConfig = DrawConfig()
    rows: dict[str, RowConfig] = Field(default={})
    """Name of the row -> its settings."""
    baseline: str | None = None
    """Row that others are compared with; null: the row `none` with as many people per picture and of the same size."""
    comparisons: tuple[tuple[str, str], ...] = ()
    """Further pairs [a, b]: what row a has beyond row b."""
    timing: TimingConfig = TimingConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    device: str = "auto"
    """`auto` takes the GPU where there is one; or `cpu`, `cuda`, `cuda:1`."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of UNet and text encoder. `auto`: fp16 on a GPU, else fp32. The VAE always runs in fp32."""

    @model_validator(mode="after")
    def _complete(self) -> Protocol:
        if not self.rows:
            raise ValueError("rows is empty; name at least one row of settings to evaluate")
        if (self.people.photos is None) == (self.people.data is None):
            raise ValueError("give the people as people.photos (a folder) or as people.data (a prepared data set)")
        if not self.model.base and any(row.pictures is None for row in self.rows.values()):
            raise ValueError("model.base is not set; give the base model with --base")
        named = [self.baseline, self.timing.row, *(name for pair in self.comparisons for name in pair)]
        unknown = sorted({name for name in named if name is not None} - set(self.rows))
        if unknown:
            raise ValueError(f"there is no row {unknown[0]!r}; rows are {', '.join(self.rows)}")
        return self
