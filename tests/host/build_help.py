"""`python dev.py pages --comfyui PATH`: rewrites the input and output lists of the help pages in web/docs."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from comfy_host import make_base  # noqa: E402
from help_lists import with_lists  # noqa: E402
from live_server import start_server  # noqa: E402
from locale_words import own_schemas  # noqa: E402

PAGES = ROOT / "web" / "docs"


def main(argv: Sequence[str]) -> int:
    """Returns 1 when a node has no page."""
    parser = argparse.ArgumentParser(prog="dev.py pages", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout; only read")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fusedid-help-", ignore_cleanup_errors=True) as folder:
        server = start_server(options.comfyui.resolve(), make_base(Path(folder)), ROOT)
        try:
            schemas = own_schemas(server.object_info())
        finally:
            server.stop()
    for name, schema in schemas.items():
        page = PAGES / f"{name}.md"
        if page.exists():
            text = with_lists(page.read_text(encoding="utf-8"), schema)
            page.write_text(text, encoding="utf-8", newline="\n")
    missing = [name for name in schemas if not (PAGES / f"{name}.md").exists()]
    sys.stderr.write("".join(f"write web/docs/{name}.md\n" for name in missing))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
