"""Stage ``pack``: cut, scale and write the samples as webdataset tars, and note where every member lies."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from faces.align import crop_square, transform_points

from .config import PrepareConfig
from .decode import DropError
from .reasons import dropped
from .scan import load_again
from .stage import Context, Stage, Tables
from .tables import DROP_FIELDS, FLOATS, Row
from .tar_writer import TarWriter

MEMBERS = ("target", "reference", "mask", "embedding", "text", "json")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("face_box", FLOATS),
        ("keypoints", FLOATS),
        *((f"{member}_{what}", pa.int64()) for member in MEMBERS for what in ("offset", "size")),
        *DROP_FIELDS,
    ]
)


def shard_path(shard: int) -> str:
    """Where a packed shard lies in the output."""
    return f"shards/{shard:06d}.tar"


def pack(context: Context, tables: Tables, shard: int) -> list[Row]:
    """Write one tar; one row per planned picture with the place of each member (size 0: not there)."""
    tar = TarWriter()
    rows = [_pack_one(context, tar, planned, shard) for planned in tables["plan"]]
    context.output.write(shard_path(shard), tar.close())
    return rows


def to_target(points: np.ndarray, planned: Row) -> np.ndarray:
    """Points ``[N, 2]`` from source pixels to those of the packed target."""
    x0, y0, x1, y1 = planned["target_box"]
    return (points - [x0, y0]) * [planned["width"] / (x1 - x0), planned["height"] / (y1 - y0)]


def cut_target(pixels: np.ndarray, planned: Row) -> Image.Image:
    """The target box scaled to its packed size."""
    size = (planned["width"], planned["height"])
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, box=tuple(planned["target_box"]))


def draw_mask(planned: Row) -> Image.Image:
    """The face region as ``L``, 255 inside, in target pixels; empty without a face."""
    mask = Image.new("L", (planned["width"], planned["height"]), 0)
    if planned["outline"]:
        outline = to_target(np.array(planned["outline"]).reshape(-1, 2), planned)
        ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in outline], fill=255)
    return mask


def cut_reference(pixels: np.ndarray, planned: Row, config: PrepareConfig) -> tuple[Image.Image, np.ndarray]:
    """The square face crop at its packed size, and the five points in its pixels."""
    side = config.crops.reference_size
    crop, to_crop = crop_square(pixels, tuple(planned["box"]), margin=config.crops.reference_margin)
    points = transform_points(np.array(planned["keypoints"]).reshape(5, 2), to_crop)
    scaled = Image.fromarray(crop).resize((side, side), Image.Resampling.LANCZOS)
    return scaled, points * np.float32(side / crop.shape[0])


def _pack_one(context: Context, tar: TarWriter, planned: Row, shard: int) -> Row:
    row: Row = {"key": planned["key"], "shard": shard}
    try:
        pixels = load_again(context, planned, planned["sha256"]).pixels
    except DropError as error:
        return row | dropped(error.reason, error.detail)
    places: Row = {"face_box": None, "keypoints": None}
    if planned["box"]:
        corners = to_target(np.array(planned["box"]).reshape(2, 2), planned)
        points = to_target(np.array(planned["keypoints"]).reshape(5, 2), planned)
        places = {"face_box": _rounded(corners), "keypoints": _rounded(points)}
    row |= places
    for member, name, data in _members(context.config, planned, pixels, places):
        row[f"{member}_offset"], row[f"{member}_size"] = tar.add(f"{planned['key']}.{name}", data)
    for member in MEMBERS:
        row.setdefault(f"{member}_offset", 0)
        row.setdefault(f"{member}_size", 0)
    return row


def _members(config: PrepareConfig, planned: Row, pixels: np.ndarray, places: Row) -> list[tuple[str, str, bytes]]:
    """(member, suffix, content) of one sample in the order of the tar."""
    suffix = "png" if config.pack.quality == 100 else "jpg"
    info = {
        name: planned[name]
        for name in ("key", "source", "sha256", "source_width", "source_height", "width", "height", "target_box")
    }
    info |= {name: planned[name] for name in ("human", "n_faces", "score", "yaw", "sharpness", "caption")} | places
    members = [("target", suffix, _encode(cut_target(pixels, planned), config.pack.quality))]
    if planned["box"]:
        reference, points = cut_reference(pixels, planned, config)
        info["reference_keypoints"] = _rounded(points)
        members += [
            ("reference", f"face.{suffix}", _encode(reference, config.pack.quality)),
            ("mask", "mask.png", _encode(draw_mask(planned), 100)),
            ("embedding", "face.npy", _npy(np.array(planned["embedding"], dtype=np.float32))),
        ]
    if planned["caption"]:
        members.append(("text", "txt", planned["caption"].encode()))
    members.append(("json", "json", json.dumps(info, sort_keys=True).encode()))
    return members


def _encode(image: Image.Image, quality: int) -> bytes:
    sink = io.BytesIO()
    if quality == 100:
        image.save(sink, "PNG")
    else:
        image.save(sink, "JPEG", quality=quality, subsampling=0)
    return sink.getvalue()


def _npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def _rounded(points: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in points.reshape(-1)]


STAGE = Stage(
    "pack",
    1,
    ("plan",),
    SCHEMA,
    lambda config: [config.pack.quality, config.crops.reference_size, config.crops.reference_margin],
    each=pack,
    products=lambda config, shard: (shard_path(shard),),
)
