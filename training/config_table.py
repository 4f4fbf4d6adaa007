"""Every setting of a configuration as a Markdown table, from the docstrings beside the fields."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def settings_table(model: type[BaseModel]) -> str:
    """`| setting | default | meaning |`, nested sections with dotted names."""
    rows = [f"| `{name}` | `{_default(field)}` | {_meaning(field)} |" for name, field in _fields(model, "")]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _default(field: FieldInfo) -> str:
    return json.dumps(_plain(field.get_default()), ensure_ascii=False)


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")
