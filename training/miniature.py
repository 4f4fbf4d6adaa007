"""The miniature: a face model small enough to ship with the code, made by this project's own trainer.

`python -m training.miniature unpack --out FOLDER` writes the shipped weights as ComfyUI's files (`checkpoints/`,
`fusedid/`) and as a diffusers folder (`diffusers/`). `pack` is how they came into `miniature/`: the UNet and the VAE as
8-bit integers, because a node pack should be quick to clone. What is measured is measured on the unpacked weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention.files import FORMAT, read_header, read_tensors, write_atomic

from .base_files import comfy_checkpoint
from .new_base import CONTEXT, TEXT_TOKENS, new_pipeline, new_unet
from .quantise import quantised, restored

logger = logging.getLogger("fusedid")
SHIPPED = Path(__file__).resolve().parents[1] / "miniature"
BASE_FILE = "base.int8.safetensors"
ADAPTER_PREFIX = "fusedid_mini_"
CHECKPOINT = "checkpoints/fusedid_mini.safetensors"
PROMPTLESS = "cond_stage_model.transformer."
VOCABULARY, TEXT_LAYERS = 49408, 12
SIDE = 128
"""Pixels of a picture of one person."""


def pack(base: Path, adapters: Mapping[str, Path], out: Path, *, license_: str = "CC0-1.0") -> Path:
    """Writes `out`: the base folder's UNet and VAE in 8 bits, and the adapters as they are."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    vae = AutoencoderTiny.from_pretrained(base / "vae")
    scheduler = json.loads((base / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    weights = {f"unet.{name}": w for name, w in unet.state_dict().items()}
    weights |= {f"vae.{name}": w for name, w in vae.state_dict().items()}
    checkpoint = base.parent / "checkpoint.safetensors"
    metadata = read_header(checkpoint).metadata if checkpoint.is_file() else {}
    layout = {
        "fusedid.format": FORMAT,
        "fusedid.kind": "base",
        "fusedid.license": license_,
        "fusedid.multipliers": json.dumps([width // 320 for width in unet.config["block_out_channels"]]),
        "fusedid.layers": str(unet.config["layers_per_block"]),
        "fusedid.fine": str(int(unet.config["up_block_types"][-1] == "CrossAttnUpBlock2D")),
        "fusedid.prediction": scheduler["prediction_type"],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / BASE_FILE, quantised(weights), {**metadata, **layout, "format": "pt"})
    for name, path in adapters.items():
        shutil.copyfile(path, out / f"{ADAPTER_PREFIX}{name}.safetensors")
    return out


def load_miniature(path: Path = SHIPPED / BASE_FILE) -> Any:
    """diffusers' pipeline with the shipped UNet and VAE, fp32. Raises ValueError when the file is not there."""
    from diffusers import AutoencoderTiny

    header = read_header(path)
    weights = restored(read_tensors(header))
    layout = {name: json.loads(header.metadata[f"fusedid.{name}"]) for name in ("multipliers", "layers", "fine")}
    unet = new_unet(layout["multipliers"], layout["layers"], fine=bool(layout["fine"]))
    vae: Any = AutoencoderTiny(scaling_factor=1.0)
    for prefix, module in (("unet.", unet), ("vae.", vae)):
        module.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})
        module.requires_grad_(False).eval()
    return new_pipeline(unet, vae, prediction=header.metadata["fusedid.prediction"])


def unpack(out: Path, folder: Path = SHIPPED) -> Path:
    """Writes the ComfyUI files and the diffusers folder below `out`, which is shaped like ComfyUI's `models`."""
    pipeline = load_miniature(folder / BASE_FILE)
    header = read_header(folder / BASE_FILE)
    pipeline.save_pretrained(out / "diffusers" / "fusedid_mini")
    checkpoint = out / CHECKPOINT
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    write_with_zeros(checkpoint, comfy_checkpoint(pipeline.unet, pipeline.vae), dict(silent_clip()), header.metadata)
    (out / "fusedid").mkdir(parents=True, exist_ok=True)
    for adapter in sorted(folder.glob(f"{ADAPTER_PREFIX}*.safetensors")):
        shutil.copyfile(adapter, out / "fusedid" / adapter.name)
    return out


def silent_clip() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of SD1.5's text encoder in a checkpoint. All zeros, it says zeros about every prompt."""
    inner = PROMPTLESS + "text_model."
    yield inner + "embeddings.token_embedding.weight", (VOCABULARY, CONTEXT)
    yield inner + "embeddings.position_embedding.weight", (TEXT_TOKENS, CONTEXT)
    for layer in range(TEXT_LAYERS):
        name = f"{inner}encoder.layers.{layer}."
        linears = [(f"self_attn.{part}_proj", CONTEXT, CONTEXT) for part in ("q", "k", "v", "out")]
        linears += [("mlp.fc1", 4 * CONTEXT, CONTEXT), ("mlp.fc2", CONTEXT, 4 * CONTEXT)]
        for part, rows, columns in linears:
            yield f"{name}{part}.weight", (rows, columns)
            yield f"{name}{part}.bias", (rows,)
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{name}{norm}.weight", (CONTEXT,)
            yield f"{name}{norm}.bias", (CONTEXT,)
    yield inner + "final_layer_norm.weight", (CONTEXT,)
    yield inner + "final_layer_norm.bias", (CONTEXT,)


def write_with_zeros(
    path: Path, weights: Mapping[str, Tensor], zeros: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
) -> None:
    """A safetensors file in which fp16 zeros follow the weights as a hole, which takes no room on most disks."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in [*((name, tuple(w.shape)) for name, w in weights.items()), *zeros.items()]:
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            file.write(weight.to(torch.float16).contiguous().numpy().tobytes())
        file.truncate(8 + len(text) + end)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m training.miniature", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = made.add_subparsers(dest="command", required=True)
    out = commands.add_parser("unpack", help="shipped weights to ComfyUI's files and a diffusers folder")
    out.add_argument("--out", required=True, help="ComfyUI's models folder, or any other")
    into = commands.add_parser("pack", help="a trained base and its adapters into the shipped form")
    into.add_argument("--base", required=True, help="base folder of the denoiser run")
    into.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE", help="once per adapter")
    into.add_argument("--license", default="CC0-1.0", help="licence of the weights (default: CC0-1.0)")
    into.add_argument("--out", default=str(SHIPPED))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    options = parser().parse_args(arguments)
    try:
        if options.command == "unpack":
            logger.info("wrote %s", unpack(Path(options.out).expanduser()))
        else:
            adapters = dict(_pair(text) for text in options.adapter)
            base, out = Path(options.base).expanduser(), Path(options.out).expanduser()
            logger.info("wrote %s", pack(base, adapters, out, license_=options.license))
    except ValueError as error:
        logger.error("%s", error)
        return 2
    return 0


def _pair(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not Path(path).expanduser().is_file():
        raise ValueError(f"--adapter is {text!r}; it must be NAME=FILE with an existing adapter file")
    return name, Path(path).expanduser()


if __name__ == "__main__":
    sys.exit(main())
