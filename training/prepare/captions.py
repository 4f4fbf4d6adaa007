"""Stage ``captions``: the text beside a picture, from ``.txt`` or a field of ``.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from .reasons import alive, dropped
from .stage import Context, Stage, Tables
from .tables import DROP_FIELDS, Row

SCHEMA = pa.schema([("caption", pa.string()), ("caption_from", pa.string()), *DROP_FIELDS])


def captions(context: Context, tables: Tables, shard: int) -> list[Row]:
    """One row per listed file, with its caption and where it came from."""
    return [
        _caption(context, listed) if alive(listed, *earlier) else {}
        for listed, *earlier in zip(*(tables[name] for name in STAGE.needs), strict=True)
    ]


def caption_in_json(data: bytes, fields: Sequence[str]) -> tuple[str, str] | None:
    """(field, text) of the first field that holds a text or a list of texts; None when there is none."""
    try:
        values: Any = json.loads(data)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    for name in fields:
        value = values.get(name)
        text = value[0] if isinstance(value, list) and value else value
        if isinstance(text, str) and text.strip():
            return name, clean(text)
    return None


def clean(text: str) -> str:
    """One line without surrounding or doubled white space."""
    return " ".join(text.replace("\ufeff", "").split())


def _caption(context: Context, listed: Row) -> Row:
    config = context.config.captions
    text = clean(_read(context, listed, "txt").decode("utf-8", "replace"))
    if text:
        return {"caption": text, "caption_from": "txt"}
    found = caption_in_json(_read(context, listed, "json"), config.fields)
    if found is not None:
        return {"caption": found[1], "caption_from": f"json:{found[0]}"}
    if config.required:
        return dropped("no_caption", f"no .txt and no {'/'.join(config.fields)} in a .json beside it")
    return {"caption": config.default, "caption_from": "default"}


def _read(context: Context, listed: Row, kind: str) -> bytes:
    if listed[kind] is None:
        return b""
    try:
        return context.read_input(listed["root"], listed[kind])
    except OSError:
        return b""


STAGE = Stage(
    "captions", 1, ("list", "scan", "dedupe", "select"), SCHEMA, lambda config: config.captions, each=captions
)
