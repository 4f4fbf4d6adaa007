"""The lists of inputs and outputs in `web/docs/<NodeId>.md`, from `/object_info`.

A list stands between `<!-- inputs -->` or `<!-- outputs -->` and its closing comment; everything else on a page is
written by hand.
"""

from __future__ import annotations

import re
from typing import Any

from workflow_forms import InputSpec, input_specs

INSTALLED = {"adapter", "face_pack", "guidance", "identity_file", "prior", "provider"}
FILES = INSTALLED | {"folder"}  # lists that differ by machine
HUGE = 2**31


def with_lists(page: str, schema: dict[str, Any]) -> str:
    """A page whose lists are those of a node's schema. ValueError when a pair of marks is missing."""
    for name, text in (("inputs", inputs_list(schema)), ("outputs", outputs_list(schema))):
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no <!-- {name} --> ... <!-- /{name} -->")
        page = place.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page, count=1)  # noqa: B023
    return page


def inputs_list(schema: dict[str, Any]) -> str:
    """Markdown, one entry per input: name, what it takes, default, effect. No table: the help panel is narrow."""
    return "\n".join(f"* **{spec.name}** ({_facts(spec)}): {plain(_tooltip(spec))}" for spec in input_specs(schema))


def outputs_list(schema: dict[str, Any]) -> str:
    """Markdown, one entry per output: name, type, meaning where a tooltip gives one."""
    names = schema.get("output_name") or schema["output"]
    tooltips = schema.get("output_tooltips") or [None] * len(names)
    return "\n".join(
        f"* **{name}** ({kind})" + (f": {plain(tooltip)}" if tooltip else "")
        for name, kind, tooltip in zip(names, schema["output"], tooltips)
    )


def _tooltip(spec: InputSpec) -> str:
    return str(spec.options.get("tooltip", ""))


def _facts(spec: InputSpec) -> str:
    facts = [takes(spec)]
    if value := default(spec):
        facts.append(f"default {value}")
    if not spec.required and not spec.is_widget:
        facts.append("optional")
    if spec.options.get("advanced"):
        facts.append("advanced")
    return "; ".join(facts)


def takes(spec: InputSpec) -> str:
    """Type and range of an input: `0 to 10 in steps of 0.05`, the choices of a drop-down, or a socket's type."""
    options = spec.options
    if spec.type == "COMBO":
        choices = options.get("options") or []
        if spec.name in FILES:
            return "what is installed" if spec.name in INSTALLED else "what is in ComfyUI's input folder"
        return ", ".join(f"`{choice}`" for choice in choices)
    if spec.type in ("INT", "FLOAT"):
        high = options.get("max", HUGE)
        size = "any whole number" if high >= HUGE else f"{options['min']:g} to {high:g}"
        return size if spec.type == "INT" else f"{size} in steps of {options['step']:g}"
    words = {"STRING": "text", "BOOLEAN": "on or off"}
    return words.get(spec.type, spec.type)


def default(spec: InputSpec) -> str:
    """An untouched widget's value; nothing for sockets and for lists of files."""
    if not spec.is_widget or spec.name in FILES:
        return ""
    value = spec.default
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, (int, float)) else (f"`{value}`" if value else "empty")


def plain(text: str) -> str:
    """Text that markdown shows as it is."""
    return re.sub(r"([*_<`])", r"\\\1", text.replace("\n", " "))
