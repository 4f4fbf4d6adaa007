"""Command line: ``python -m training.prepare --input photos --output data [--config prepare.yaml] [--set a.b=c]``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from training.config_io import load_config

from .config import PrepareConfig
from .pipeline import Summary, prepare

logger = logging.getLogger("fusedid")

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the preparation; returns the exit code: 0 done, 1 a problem that the message explains, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = _parser().parse_args(arguments)
    if options.schema:
        sys.stdout.write(json.dumps(PrepareConfig.model_json_schema(), indent=2) + "\n")
        return 0
    try:
        config = load_config(PrepareConfig, options.config, _overrides(options))
        summary = prepare(config, quiet=options.quiet)
    except ValueError as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("stopped; finished work is kept, run the same command to go on")
        return INTERRUPTED
    _say(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description="Photos to training shards.")
    parser.add_argument("--config", metavar="YAML", help="settings; everything not in it keeps its default")
    parser.add_argument("--input", action="append", metavar="PATH", help="folder, tar or URL; may be repeated")
    parser.add_argument("--output", metavar="PATH", help="folder or URL for the shards")
    parser.add_argument("--executor", choices=("processes", "inline", "ray"), help="where the work runs")
    parser.add_argument("--workers", type=int, metavar="N", help="worker processes; 0 is one per core")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--schema", action="store_true", help="print the settings' JSON schema and stop")
    return parser


def _overrides(options: argparse.Namespace) -> list[str]:
    named = [("input", options.input), ("output", options.output)]
    named += [("run.executor", options.executor), ("run.workers", options.workers)]
    return [*(f"{name}={json.dumps(value)}" for name, value in named if value is not None), *options.set]


def _say(summary: Summary) -> None:
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary.reasons.items()) or "none"
    logger.info("%d samples in %s; dropped %d: %s", summary.kept, summary.output, summary.dropped, dropped)
    logger.info("Read %s/report.md", summary.output)


if __name__ == "__main__":
    raise SystemExit(main())
