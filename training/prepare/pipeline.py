"""The whole preparation, top to bottom: check, list, run the stages, write the index and the report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from training.storage import LocalStore, Store

from .cache import cache_models
from .config import PrepareConfig, check_config
from .executors import open_executor
from .find_faces import encoder_identity
from .index import MANIFEST, Result, build_result, write_result_files
from .listing import list_inputs
from .progress import Progress
from .reasons import ADVICE
from .report import counts_by_reason, write_report
from .runner import Run, run_stage, store_table
from .stage import Context
from .stages import ORDER

logger = logging.getLogger("fusedid")

OURS = frozenset(("work", "shards", "cache", "report"))
"""What an output folder may hold before the first run is finished."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    kept: int
    dropped: int
    reasons: dict[str, int]
    output: str


def prepare(config: PrepareConfig, *, quiet: bool = False) -> Summary:
    """Bring ``config.output`` up to date with the inputs; does only what is missing.

    Raises ``ValueError`` for settings, inputs or a disk that make it impossible, and when every picture was dropped;
    everything finished until then is kept and the same call goes on from there.
    """
    check_config(config)
    context = Context(config)
    _check_output(config, context.output)
    # A missing model should be known before a million files are read.
    encoder_identity(config.faces)
    cache_models(config)
    try:
        result = _run(context, quiet)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{reason}. Finished work is kept; remove the cause and run the same command again") from error
    return _finish(config, result)


def _run(context: Context, quiet: bool) -> Result:
    context.output.sweep()
    with open_executor(context.config) as executor:
        run = Run(context, executor, Progress(quiet))
        _list(run)
        for stage in ORDER:
            if stage.name == "pack" and not run.rows["plan"]:
                break
            run_stage(run, stage)
    result = build_result(context, run.rows)
    write_result_files(context, result)
    write_report(context, result, run.progress.timings, len(run.rows["list"]))
    return result


def _list(run: Run) -> None:
    table = list_inputs(run.context.config.input)
    step = run.context.config.run.batch
    parts = [table.slice(start, step).combine_chunks() for start in range(0, table.num_rows, step)]
    store_table(run, "list", parts, "1")
    _log_list(table)


def _log_list(table: pa.Table) -> None:
    pictures = table["reason"].null_count
    logger.info("%d pictures, %d other files", pictures, table.num_rows - pictures)


def _finish(config: PrepareConfig, result: Result) -> Summary:
    reasons = counts_by_reason(result.dropped)
    if not result.index.num_rows:
        counts = "\n".join(f"  {count} {reason}: {ADVICE[reason]}" for reason, count in reasons.items())
        raise ValueError(
            f"all {result.dropped.num_rows} inputs were dropped, so there is nothing to train on:\n{counts}\n"
            f"Each one is listed in {config.output}/dropped.parquet; loosen the settings named above and run again "
            "(finished work is kept)"
        )
    return Summary(result.index.num_rows, result.dropped.num_rows, reasons, config.output)


def _check_output(config: PrepareConfig, output: Store) -> None:
    if not isinstance(output, LocalStore):
        return
    folder = Path(output.root).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} is a file; give a folder that is new, empty, or of an earlier run")
    for path in config.input:
        source = Path(path).expanduser().resolve()
        if "://" not in path and (folder == source or source in folder.parents):
            raise ValueError(f"the output {folder} lies inside the input {source}; choose a folder outside of it")
    strangers = sorted(set(output.names("")) - OURS)
    if strangers and not output.exists(MANIFEST):
        raise ValueError(
            f"the output {folder} holds files that are not ours ({', '.join(strangers[:3])}); give a folder that is "
            "new, empty, or of an earlier run"
        )
