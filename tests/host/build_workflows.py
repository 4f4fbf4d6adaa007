"""`python dev.py workflows --comfyui PATH`: writes the UI form of every example workflow from its API form.

Widgets that an API form leaves out get the node's default first, so that both forms say everything. A note for the UI
form stands in `example_workflows/api/<name>.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from comfy_host import make_base  # noqa: E402
from live_server import start_server  # noqa: E402
from workflow_forms import completed, faults, ui_from_api  # noqa: E402

EXAMPLES = ROOT / "example_workflows"


def main(argv: Sequence[str]) -> int:
    """Rewrites the named examples (default: all); returns 1 when one does not fit the nodes."""
    parser = argparse.ArgumentParser(prog="dev.py workflows", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout; only read")
    parser.add_argument("names", nargs="*", help="examples to rewrite (default: all)")
    options = parser.parse_args(argv)
    names = options.names or sorted(path.stem for path in (EXAMPLES / "api").glob("*.json"))
    with tempfile.TemporaryDirectory(prefix="fusedid-workflows-", ignore_cleanup_errors=True) as folder:
        server = start_server(options.comfyui.resolve(), make_base(Path(folder)), ROOT)
        try:
            schemas = server.object_info()
        finally:
            server.stop()
    wrong = {name: problems for name in names if (problems := rewrite(name, schemas))}
    for name, problems in wrong.items():
        sys.stderr.write(f"{name} was left as it is:\n  " + "\n  ".join(problems) + "\n")
    return 1 if wrong else 0


def rewrite(name: str, schemas: dict[str, Any]) -> list[str]:
    """Writes both forms of one example; returns what is wrong with it instead when it does not fit the schemas."""
    place, note = EXAMPLES / "api" / f"{name}.json", EXAMPLES / "api" / f"{name}.md"
    api = json.loads(place.read_text(encoding="utf-8"))
    if problems := [f"no node {e['class_type']}" for e in api.values() if e["class_type"] not in schemas]:
        return problems
    api = completed(api, schemas)
    if problems := faults(api, schemas):
        return problems
    text = note.read_text(encoding="utf-8").strip() if note.exists() else ""
    write(place, api)
    write(EXAMPLES / f"{name}.json", ui_from_api(api, schemas, note=text, name=name))
    return []


def write(place: Path, form: dict[str, Any]) -> None:
    """JSON with two spaces and a line feed at the end, the same on every system."""
    place.write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
