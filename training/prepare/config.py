"""Every setting of the preparation, with its unit and bounds. Unknown keys are refused."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from training.config_io import Config


class ScanConfig(Config):
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Pictures with more pixels are dropped before they are decoded (100 million need 300 MB in each worker)."""
    animated: Literal["first_frame", "drop"] = "first_frame"
    """What to do with GIF, APNG, animated WebP and multi-page TIFF."""


class DedupeConfig(Config):
    exact: bool = True
    """Drop files whose bytes are equal to those of an earlier one."""
    max_distance: int | None = Field(default=10, ge=0, le=64)
    """Largest number of differing bits (of 256, difference hash) between near duplicates; null keeps them all."""


class FacesConfig(Config):
    pack: str = "buffalo_l"
    """Face pack on disk: ``buffalo_l``, ``antelopev2``, a folder's name, or ``opencv`` (YuNet and SFace).
    ``none`` looks for no faces: every picture counts as non-human (FaceStudio's second data set)."""
    roots: tuple[str, ...] = ("models/insightface", "../../models/insightface", "~/.insightface")
    """Folders in which packs (``<root>/models/<pack>``) or OpenCV's two models are looked for. The second is ComfyUI's
    own when this runs in ``custom_nodes/<this pack>``."""
    provider: str = "auto"
    """``auto`` or one of onnxruntime's providers, e.g. ``CUDA``, ``CPU``."""
    det_size: int = Field(default=640, ge=128, le=1920, multiple_of=32)
    """Side in pixels of the square the detector first looks at; smaller ones and padding are tried when it fails."""


class SelectConfig(Config):
    min_side: int = Field(default=512, ge=1)
    """Least short side of the picture in pixels (512 for SD1.5, 1024 for SDXL)."""
    max_faces: int = Field(default=1, ge=1)
    """Pictures with more faces are dropped; faces smaller than ``ignore_below`` of the largest do not count."""
    ignore_below: float = Field(default=0.1, ge=0, le=1)
    """Area of a bystander's face relative to the largest, below which it is not counted."""
    no_face: Literal["drop", "non_human"] = "drop"
    """``non_human`` keeps pictures without a face, with a zero face embedding (METHOD 2.5)."""
    min_score: float = Field(default=0.6, ge=0, le=1)
    """Least detection score of the main face."""
    min_face_side: int = Field(default=112, ge=1)
    """Least short side of the main face's box in pixels."""
    min_face_area: float = Field(default=0.04, ge=0, le=1)
    """Least share of the picture covered by the main face's box."""
    max_yaw: float = Field(default=60.0, ge=0, le=90)
    """Largest turn of the head to a side in degrees, estimated from the key points."""
    min_sharpness: float = Field(default=0.0, ge=0)
    """Least variance of the aligned face's Laplacian (grey levels squared); look at the report's histogram first."""
    min_norm: float = Field(default=0.0, ge=0)
    """Least length of the raw face embedding; look at the report's histogram first."""


class CropsConfig(Config):
    resolution: int = Field(default=512, ge=64, le=4096, multiple_of=8)
    """Side of the packed square, or the side of a square with a bucket's area."""
    mode: Literal["square", "bucket"] = "square"
    """``bucket`` keeps the picture's shape: the nearest of a list of sizes with about the same area."""
    bucket_step: int = Field(default=64, ge=8, multiple_of=8)
    """Sides of buckets are multiples of this."""
    max_aspect: float = Field(default=2.0, ge=1, le=4)
    """Longest to shortest side of the most oblong bucket."""
    around: Literal["picture", "face"] = "picture"
    """``picture``: the largest crop that fits. ``face``: a square around the main face, as wide as the face crop with
    ``face_margin``; for models of faces only. Pictures without a face keep the largest crop."""
    face_margin: float = Field(default=0.3, ge=0, le=2)
    """Width that ``around: face`` adds on each side of the face box, relative to its longer side."""
    reference_size: int = Field(default=512, ge=64, le=2048, multiple_of=8)
    """Side in pixels of the packed face crop."""
    reference_margin: float = Field(default=0.3, ge=0, le=2)
    """Width added on each side of the face box, relative to its longer side; the node's default is the same."""


class MaskConfig(Config):
    shape: Literal["ellipse", "landmarks", "box"] = "ellipse"
    """``ellipse`` around the face box, turned as the eyes are; ``landmarks``: the five points grown to a hull."""
    dilate: float = Field(default=0.3, ge=0, le=2)
    """How much larger than the face, relative to its size; the node hides style faces with the same default."""


class CaptionsConfig(Config):
    fields: tuple[str, ...] = ("caption", "text", "prompt")
    """Keys looked up, in this order, in a ``.json`` beside the picture; a ``.txt`` beside it comes first."""
    required: bool = False
    """Drop pictures without a caption."""
    default: str = ""
    """Caption of pictures that have none."""


class IdentityConfig(Config):
    source: Literal["embedding", "folder", "regex"] = "embedding"
    """Who is on a picture: face clusters, the name of its folder, or group 1 of ``regex`` on its key."""
    regex: str | None = None
    threshold: float = Field(default=0.55, ge=-1, le=1)
    """Least average cosine between the members of a cluster (calibrate it with the report's histogram)."""
    duplicate_cosine: float = Field(default=0.99, ge=0, le=1)
    """Photos of one person that are more alike are one photo, cropped twice: the smaller is dropped; 1 keeps all."""
    max_pairs: int = Field(default=8, ge=0)
    """Same-person pairs listed per picture in ``pairs.parquet``."""

    @field_validator("regex")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        return _checked_regex(value, groups=1)


class SplitConfig(Config):
    by: Literal["person", "regex", "none"] = "person"
    """``person`` puts all photos of a person into one split; ``regex`` searches the two patterns in the key."""
    val: float = Field(default=0.02, ge=0, le=1)
    """Share of the people (not of the photos) for validation."""
    test: float = Field(default=0.0, ge=0, le=1)
    seed: int = 0
    val_regex: str | None = None
    test_regex: str | None = None

    @field_validator("val_regex", "test_regex")
    @classmethod
    def _valid(cls, value: str | None) -> str | None:
        return _checked_regex(value, groups=0)


class PackConfig(Config):
    samples_per_shard: int = Field(default=1000, ge=1)
    quality: int = Field(default=95, ge=50, le=100)
    """JPEG quality of the target and of the face crop; 100 is stored as lossless PNG."""


class CacheConfig(Config):
    base_model: str | None = None
    """A diffusers folder or a ``.safetensors`` checkpoint. Without one the trainer encodes on the fly."""
    vae: bool = True
    """Cache the VAE's moments (mean and log variance) of target and face crop; needs ``base_model``."""
    text: bool = False
    """Cache text embeddings of the captions and of the empty prompt; needs ``base_model``."""
    clip_vision: tuple[str, ...] = ()
    """transformers CLIP folders, or ``open_clip:<model>/<weights>``: caches their embeddings, side by side, of the
    target with its face hidden (FaceStudio's style image)."""
    device: str = "auto"
    """``auto`` is the first CUDA device or the CPU."""
    batch_size: int = Field(default=4, ge=1)


class RunConfig(Config):
    executor: Literal["processes", "inline", "ray"] = "processes"
    workers: int = Field(default=0, ge=0)
    """Worker processes; 0 is one per core."""
    batch: int = Field(default=128, ge=1)
    """Inputs per unit of work: what is lost at most, per worker, when the run is killed."""
    ray_address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine."""


class PrepareConfig(Config):
    """``python -m training.prepare``"""

    config_version: Literal[1] = 1
    input: tuple[str, ...] = Field(min_length=1)
    """Folders of pictures, webdataset tars, or img2dataset's output; searched recursively."""
    output: str = Field(min_length=1)
    """Folder or fsspec URL of the shards; work files go to its ``work`` folder."""
    scan: ScanConfig = ScanConfig()
    dedupe: DedupeConfig = DedupeConfig()
    faces: FacesConfig = FacesConfig()
    select: SelectConfig = SelectConfig()
    crops: CropsConfig = CropsConfig()
    mask: MaskConfig = MaskConfig()
    captions: CaptionsConfig = CaptionsConfig()
    identity: IdentityConfig = IdentityConfig()
    split: SplitConfig = SplitConfig()
    pack: PackConfig = PackConfig()
    cache: CacheConfig = CacheConfig()
    run: RunConfig = RunConfig()

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


def check_config(config: PrepareConfig) -> None:
    """Settings that contradict each other: ``ValueError`` before any work is done."""
    if config.identity.source == "regex" and not config.identity.regex:
        raise ValueError("identity.source is 'regex' but identity.regex is empty; give a pattern such as '^([^/]+)/'")
    if config.split.by == "regex" and not (config.split.val_regex or config.split.test_regex):
        raise ValueError("split.by is 'regex' but neither split.val_regex nor split.test_regex is given")
    if config.split.val + config.split.test >= 1 and config.split.by == "person":
        total = config.split.val + config.split.test
        raise ValueError(f"split.val + split.test is {total:g}, which leaves nothing to train on; keep it below 1")
    if config.crops.around == "face" and config.crops.mode == "bucket":
        raise ValueError("crops.around is 'face', which cuts squares; set crops.mode=square, or crops.around=picture")
    if config.cache.text and not config.cache.base_model:
        raise ValueError("cache.text needs cache.base_model, the diffusers folder whose text encoder is to be used")
    if config.faces.pack == "none" and config.select.no_face == "drop":
        raise ValueError(
            "faces.pack is 'none', so every picture would be dropped for having no face; "
            "add --set select.no_face=non_human, or choose a face pack"
        )


def _checked_regex(pattern: str | None, *, groups: int) -> str | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a valid regular expression ({error})") from error
    if compiled.groups < groups:
        raise ValueError(f"needs {groups} group in parentheses, the part that names the person")
    return pattern
