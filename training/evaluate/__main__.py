"""Command line: `python -m training.evaluate --protocol mini --base MODEL --weights FOLDER --people DIR --out DIR`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config_io import parse_override, read_yaml, set_value, validate
from training.config_table import settings_table

from .config import Protocol, RowConfig
from .run import Evaluation

logger = logging.getLogger("fusedid")
PRESETS = Path(__file__).resolve().parents[1] / "configs" / "evaluate"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Pictures of people by several rows of settings, scored."
    )
    made.add_argument("--protocol", help=f"{', '.join(preset_names())}, or a YAML file")
    made.add_argument("--out", help="folder for pictures, records and report; the same folder goes on where it stopped")
    made.add_argument("--base", help="diffusers folder or .safetensors checkpoint (model.base)")
    made.add_argument("--people", help="folder of photos (people.photos), or a prepared data set (people.data)")
    made.add_argument("--weights", help="folder of the rows' adapter files")
    made.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows of the protocol")
    made.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting")
    made.add_argument("--settings", action="store_true", help="print every setting as a Markdown table and stop")
    return made


def preset_names() -> list[str]:
    """The shipped protocols."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_protocol(options: argparse.Namespace) -> Protocol:
    """Preset or file, then the named options, then `--set`. Raises ValueError naming what is wrong."""
    if not options.protocol:
        raise ValueError(f"give a protocol: --protocol {', '.join(preset_names())}, or a YAML file")
    preset = PRESETS / f"{options.protocol}.yaml"
    values = read_yaml(preset if preset.is_file() else options.protocol)
    for override in [*_named(options), *options.set]:
        set_value(values, *parse_override(override))
    if options.rows:
        values["rows"] = _chosen(values.get("rows") or {}, options.rows)
        _forget(values)
    return validate(Protocol, values, origin=options.protocol)


def _named(options: argparse.Namespace) -> list[str]:
    named = {"model.base": options.base}
    if options.people:
        prepared = (Path(options.people).expanduser() / "manifest.json").is_file()
        named["people.data" if prepared else "people.photos"] = options.people
        named["people.photos" if prepared else "people.data"] = None
    given = {name: value for name, value in named.items() if value is not None or name.startswith("people.")}
    return [f"{name}={json.dumps(value)}" for name, value in given.items()]


def _chosen(rows: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise ValueError(f"--rows: there is no row {unknown[0]!r}; this protocol has {', '.join(rows)}")
    return {name: rows[name] for name in rows if name in names}


def _forget(values: dict[str, Any]) -> None:
    """With rows left out, comparisons with them are left out too."""
    rows = values["rows"]
    values["comparisons"] = [pair for pair in values.get("comparisons") or [] if set(pair) <= set(rows)]
    timing = values.get("timing") or {}
    if timing.get("row") not in rows:
        values["timing"] = {**timing, "row": None}
    if values.get("baseline") not in rows:
        values["baseline"] = None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 for errors the user can put right, 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    if options.settings:
        sys.stdout.write(f"{settings_table(Protocol)}\nA row:\n\n{settings_table(RowConfig)}")
        return 0
    try:
        if not options.out:
            raise ValueError("give the folder for the results with --out")
        out = Path(options.out).expanduser()
        Evaluation(load_protocol(options), out, weights=options.weights).run(given)
    except ValueError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.error("stopped; what is drawn is kept, run the same command to go on")
        return 130
    logger.info("read %s", out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
