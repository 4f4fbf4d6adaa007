"""`python dev.py contract --comfyui PATH`: adds new nodes and appended inputs to tests/data/node_contract.json.

A change that breaks saved workflows is refused: node ids, inputs and their order are a promise. Also keeps the examples
of this version under tests/data/old_workflows, where they stay for ever.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from build_workflows import write  # noqa: E402
from comfy_host import make_base  # noqa: E402
from live_server import start_server  # noqa: E402
from locale_words import own_schemas  # noqa: E402
from node_contract import PINNED, broken, contract_of, pinned  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Returns 1 when the nodes break the promise."""
    parser = argparse.ArgumentParser(prog="dev.py contract", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout; only read")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fusedid-contract-", ignore_cleanup_errors=True) as folder:
        server = start_server(options.comfyui.resolve(), make_base(Path(folder)), ROOT)
        try:
            schemas = own_schemas(server.object_info())
        finally:
            server.stop()
    now = {name: contract_of(schema) for name, schema in sorted(schemas.items())}
    if problems := broken(pinned(), now):
        sys.stderr.write("saved workflows would break:\n  " + "\n  ".join(problems) + "\n")
        return 1
    write(PINNED, now)
    keep_examples()
    return 0


def keep_examples() -> None:
    """Copies both forms of every example to the folder of this version, where there is none of that name yet."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "([^"]+)"', project, re.MULTILINE)
    assert version
    for form, source in (("ui", ROOT / "example_workflows"), ("api", ROOT / "example_workflows" / "api")):
        place = PINNED.parent / "old_workflows" / version[1] / form
        place.mkdir(parents=True, exist_ok=True)
        for example in source.glob("*.json"):
            if not (place / example.name).exists():
                shutil.copyfile(example, place / example.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
