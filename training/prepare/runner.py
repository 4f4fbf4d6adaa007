"""Run one stage: find which shards are missing or stale, do those, tidy up after an earlier, longer run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from .executors import Executor, InlineExecutor
from .progress import Progress, StageTiming
from .stage import Context, Stage, fingerprint, input_digests, is_done
from .tables import content_digest, read_all, read_marks, table_path, write_result
from .unit import Unit, UnitError

logger = logging.getLogger("fusedid")


@dataclass
class Run:
    """The state of one ``prepare`` run."""

    context: Context
    executor: Executor
    progress: Progress
    rows: dict[str, list[int]] = field(default_factory=dict)
    """Rows of each shard, by stage."""

    def shards(self, stage: str) -> range:
        return range(len(self.rows[stage]))


def run_stage(run: Run, stage: Stage) -> None:
    """Bring a stage's results up to date. ``ValueError`` says what stopped it and what is safe."""
    if stage.each is not None:
        _run_each(run, stage)
    else:
        _run_whole(run, stage)
    _remove_surplus(run, stage)


def store_table(run: Run, name: str, parts: Sequence[pa.Table], mark: str) -> None:
    """Write the shards of a table whose result does not come from a stage (the list); unchanged ones are kept."""
    for shard, part in enumerate(parts):
        marks = read_marks(run.context.output, name, shard)
        if marks != (mark, content_digest(part)):
            write_result(run.context.output, name, shard, part, mark)
    run.rows[name] = [part.num_rows for part in parts]


def _run_each(run: Run, stage: Stage) -> None:
    rows = run.rows[stage.needs[0]]
    units, done_items = [], 0
    for shard, count in enumerate(rows):
        mark = fingerprint(stage, run.context.config, input_digests(stage, run.context.output, [shard]))
        if is_done(stage, run.context, shard, mark):
            done_items += count
        else:
            units.append(Unit(stage.name, shard, mark))
    timing = StageTiming(stage.name, len(rows), len(rows) - len(units))
    with run.progress.stage(timing, sum(rows)) as bar:
        # Reused results must not flatter the speed.
        bar.initial = bar.n = done_items
        try:
            executor = InlineExecutor(run.context.config) if stage.alone else run.executor
            for result in executor.run(units):
                timing.items += result.items
                timing.busy += result.seconds
                bar.update(result.items)
        except UnitError as error:
            raise ValueError(_stopped(error, timing, sum(rows), done_items)) from error
    run.rows[stage.name] = list(rows)


def _run_whole(run: Run, stage: Stage) -> None:
    output, config = run.context.output, run.context.config
    rows = run.rows[stage.needs[0]]
    mark = fingerprint(stage, config, input_digests(stage, output, range(len(rows))))
    known = _known_shards(run, stage, mark, len(rows))
    timing = StageTiming(stage.name, len(known or rows), len(known or ()))
    with run.progress.stage(timing, sum(rows)) as bar:
        if known is not None:
            bar.initial = bar.n = sum(rows)
            run.rows[stage.name] = known
            return
        assert stage.whole is not None, f"stage {stage.name} does nothing"
        tables = {need: read_all(output, need, len(run.rows[need]), stage.columns.get(need)) for need in stage.needs}
        table = stage.whole(run.context, tables)
        sizes = _shard_sizes(stage, run, table.num_rows)
        start = 0
        for shard, size in enumerate(sizes):
            write_result(output, stage.name, shard, table.slice(start, size), mark)
            start += size
        timing.items = sum(rows)
        bar.update(sum(rows))
    timing.busy = timing.wall
    run.rows[stage.name] = sizes
    # Written last: a plan of which only some shards exist must not look complete.
    output.write(_sizes_path(stage), ",".join(map(str, [mark, *sizes])).encode())


def _known_shards(run: Run, stage: Stage, mark: str, needed: int) -> list[int] | None:
    try:
        recorded, *sizes = run.context.output.read(_sizes_path(stage)).decode().split(",")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    complete = all(
        (read_marks(run.context.output, stage.name, shard) or ("",))[0] == mark for shard in range(len(sizes))
    )
    aligned = stage.rows_per_shard is not None or len(sizes) == needed
    return [int(size) for size in sizes] if recorded == mark and complete and aligned else None


def _shard_sizes(stage: Stage, run: Run, total: int) -> list[int]:
    if stage.rows_per_shard is None:
        return list(run.rows[stage.needs[0]])
    step = stage.rows_per_shard(run.context.config)
    return [min(step, total - start) for start in range(0, total, step)]


def _sizes_path(stage: Stage) -> str:
    return f"work/{stage.name}/shards.txt"


def _remove_surplus(run: Run, stage: Stage) -> None:
    """Results of an earlier run with more shards; only files that this program names itself."""
    output = run.context.output
    count = len(run.rows[stage.name])
    for path in (*stage.products(run.context.config, 0), table_path(stage.name, 0)):
        folder, _, first = path.rpartition("/")
        suffix = first.removeprefix(f"{0:06d}")
        for name in output.names(folder):
            number = name.removesuffix(suffix)
            if name.endswith(suffix) and number.isdecimal() and len(number) == 6 and int(number) >= count:
                output.remove(f"{folder}/{name}")


def _stopped(error: UnitError, timing: StageTiming, total: int, before: int) -> str:
    advice = "free some space" if error.disk_full else "remove the cause"
    return (
        f"{error.message}. {before + timing.items} of {total} pictures of stage {timing.stage} and all earlier stages "
        f"are done and kept; {advice} and run the same command again"
    )
