"""`python dev.py locales --comfyui PATH`: writes locales/en from the nodes and says what to translate.

Other languages are written by hand. Entries of inputs that are gone are removed from them; missing ones, and those
whose English text has changed since, are listed.
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
from locale_words import LANGUAGES, english, flat, own_schemas  # noqa: E402

LOCALES = ROOT / "locales"


def main(argv: Sequence[str]) -> int:
    """Returns 1 while a translation is missing or may be out of date."""
    parser = argparse.ArgumentParser(prog="dev.py locales", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout; only read")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fusedid-locales-", ignore_cleanup_errors=True) as folder:
        server = start_server(options.comfyui.resolve(), make_base(Path(folder)), ROOT)
        try:
            words = english(own_schemas(server.object_info()))
        finally:
            server.stop()
    before = flat(read("en"))
    now = flat(words)
    changed = {path for path, text in now.items() if path in before and before[path] != text}
    write("en", words)
    to_do = []
    for language in LANGUAGES[1:]:
        kept = only(read(language), words)
        write(language, kept)
        wanted = {path for path in now if path not in flat(kept)} | changed
        to_do += [f"{language}: {path}: {now[path]}" for path in sorted(wanted)]
    sys.stdout.write("".join(f"to translate: {line}\n" for line in to_do))
    return 1 if to_do else 0


def only(words: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The entries of `words` that `wanted` has too, in its order."""
    return {
        key: only(words[key], value) if isinstance(value, dict) else words[key]
        for key, value in wanted.items()
        if key in words
    }


def read(language: str) -> dict[str, Any]:
    """A language's node texts; empty when there are none yet."""
    place = LOCALES / language / "nodeDefs.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}


def write(language: str, words: dict[str, Any]) -> None:
    """JSON with two spaces and a line feed at the end, the same on every system."""
    place = LOCALES / language / "nodeDefs.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(words, indent=2, ensure_ascii=False) + "\n"
    place.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
