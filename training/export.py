"""`python -m training.export`: from a run to a folder that is ready to upload, or a file under other tensor names.

python -m training.export --run runs/fusion --out release --license openrail --data prepared/
python -m training.export --file adapter.safetensors --out release --naming diffusers
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attention.adapter import load_adapter
from attention.files import Header, read_header, read_tensors, require_finite, write_atomic

from .fusion_task import FILE_NAME
from .model_card import CardParts, model_card
from .naming import NAMINGS, naming_of, to_diffusers, to_ldm

logger = logging.getLogger("fusedid")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OUTPUTS = (FILE_NAME, "guidance.safetensors")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m training.export", description="A run to a folder ready to upload.")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder of python -m training.train")
    source.add_argument("--file", help="an adapter or guidance file")
    made.add_argument("--out", required=True, help="folder to write; must be new or empty")
    made.add_argument("--name", default="", help="name of the file without .safetensors")
    made.add_argument("--title", default="", help="heading of the model card")
    made.add_argument("--license", default="", help="licence of the weights, e.g. openrail; default: what the run says")
    made.add_argument("--data", help="prepared data folder whose report goes into the card")
    made.add_argument("--evaluation", help="results.json of python -m training.evaluate, or a Markdown file")
    made.add_argument("--dtype", choices=DTYPES, default="fp16")
    made.add_argument("--naming", choices=NAMINGS, default="ldm", help="ldm is what the node reads")
    return made


def export(options: argparse.Namespace) -> Path:
    """Writes the folder; returns the path of the weights in it. Raises ValueError for what the user can put right."""
    source = _source(options)
    out = Path(options.out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty; give a new folder, nothing is overwritten")
    header = read_header(source)
    license_ = options.license or header.metadata.get("fusedid.license", "")
    if not license_:
        raise ValueError("the weights have no licence; give one with --license, for example --license openrail")
    report, evaluation = _report(options.data), _evaluation(options.evaluation)
    path = out / f"{options.name or source.stem}.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    metadata = {**header.metadata, "fusedid.license": license_, "modelspec.license": license_}
    write_slim(header, path, metadata, naming=options.naming, dtype=DTYPES[options.dtype])
    for extra in _extras(source):
        shutil.copy2(extra, out / extra.name)
    card = CardParts(
        title=options.title or path.stem,
        file_name=path.name,
        license=license_,
        metadata=metadata,
        data_report=report,
        evaluation=evaluation,
    )
    (out / "README.md").write_text(model_card(card), encoding="utf-8")
    return path


def write_slim(header: Header, path: Path, metadata: dict[str, str], *, naming: str, dtype: torch.dtype) -> None:
    """The same weights in another precision or under other names, with all metadata, loaded back once as a check."""
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(header).items()}
    require_finite(path.name, tensors)
    if header.kind == "fusion":
        tensors = _named(tensors, naming, _layers_per_block(metadata))
        metadata = {**metadata, "fusedid.naming": naming}
    write_atomic(path, tensors, metadata)
    if header.kind == "fusion" and naming == "ldm":
        load_adapter(path)


def _named(tensors: dict[str, Tensor], naming: str, layers: int) -> dict[str, Tensor]:
    if naming_of(tensors) == naming:
        return tensors
    return to_diffusers(tensors, layers) if naming == "diffusers" else to_ldm(tensors, layers)


def _layers_per_block(metadata: dict[str, str]) -> int:
    """2 in SD1.5, SD2 and SDXL; other layouts wrote theirs down."""
    return int(metadata.get("fusedid.layers_per_block", "2"))


def _source(options: argparse.Namespace) -> Path:
    if options.file:
        return Path(options.file).expanduser()
    run = Path(options.run).expanduser()
    found = [run / name for name in OUTPUTS if (run / name).is_file()]
    if not found:
        raise ValueError(
            f"--run: {run} holds no {' or '.join(OUTPUTS)}; the run has not finished. To finish it at its newest "
            f"checkpoint, run python -m training.train --config {run}/config.yaml --set schedule.steps=<that step>"
        )
    return found[0]


def _extras(source: Path) -> list[Path]:
    """Other weights of the same result: a guidance run also trains the UNet, or a LoRA for it."""
    return sorted(source.parent.glob(f"{source.stem}_*.safetensors"))


def _report(data: str | None) -> str:
    if data is None:
        return ""
    path = Path(data).expanduser() / "report.md"
    if not path.is_file():
        raise ValueError(f"--data: {path} does not exist; give the folder that python -m training.prepare wrote")
    return path.read_text(encoding="utf-8")


def _evaluation(path: str | None) -> str:
    """The tables of an evaluation with the command that made them, or a text as it is."""
    if path is None:
        return ""
    if Path(path).suffix == ".json":
        from .evaluate.table import read_results, results_table

        results = read_results(path)
        return f"{results_table(results)}\n```\n{results['command']}\n```"
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--evaluation: cannot read {path} ({error})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        path = export(parser().parse_args(arguments))
    except ValueError as error:
        logger.error("%s", error)
        return 2
    logger.info("wrote %s and a README.md beside it", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
