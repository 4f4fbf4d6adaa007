"""What a translation of the pack's nodes must hold: every word that the frontend shows, from `/object_info`.

The frontend reads the texts with vue-i18n, for which @ { } | $ are syntax: `escaped` writes them as literals.
"""

from __future__ import annotations

import re
from typing import Any

from workflow_forms import input_specs

LANGUAGES = ("en", "zh", "ja")
SYNTAX = re.compile(r"[@{}|$]")
LITERAL = re.compile(r"\{'([@{}|$])'\}")

NodeWords = dict[str, Any]
Schemas = dict[str, dict[str, Any]]


def own_schemas(schemas: Schemas) -> Schemas:
    """The schemas of this pack's nodes among all."""
    return {name: schema for name, schema in schemas.items() if "ComfyUI-FusedID" in schema.get("python_module", "")}


def english(schemas: Schemas) -> NodeWords:
    """The content of `locales/en/nodeDefs.json` for these schemas."""
    return {name: _node_words(schema) for name, schema in sorted(schemas.items())}


def _node_words(schema: dict[str, Any]) -> NodeWords:
    names = schema.get("output_name") or schema["output"]
    tooltips = schema.get("output_tooltips") or [None] * len(names)
    return {
        "display_name": escaped(schema["display_name"]),
        "description": escaped(schema["description"]),
        "inputs": {spec.name: _words(spec.name, spec.options.get("tooltip")) for spec in input_specs(schema)},
        "outputs": {str(number): _words(name, tip) for number, (name, tip) in enumerate(zip(names, tooltips))},
    }


def _words(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": escaped(name)} | ({"tooltip": escaped(tooltip)} if tooltip else {})


def escaped(text: str) -> str:
    """Text as vue-i18n shows it unchanged."""
    return SYNTAX.sub(lambda found: f"{{'{found[0]}'}}", text)


def unescaped(text: str) -> str:
    """What vue-i18n shows for an escaped text."""
    return LITERAL.sub(lambda found: found[1], text)


def flat(words: NodeWords, prefix: str = "") -> dict[str, str]:
    """Texts by dotted path, `FaceEmbed.inputs.image.tooltip`."""
    found: dict[str, str] = {}
    for key, value in words.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found
