"""Hypothesis strategies for files from the internet: damaged bytes, damaged headers, sound headers with odd content."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1,
    "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
HUGE = (2**31, 2**32, 2**53, 2**60, 2**63, 2**64 - 1, 2**64, 10**30)
NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from(HUGE))
WORDS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "-1", "2", "512", "NaN", "1e9", "None", "true", "[]", "{}", "null", "\x00", "../../x", "/etc/x"]
    ),
    st.sampled_from(["sd15", "sdxl", "custom", "fusion", "guidance", "identity", "clean", "paper", "unit", "9" * 5000]),
    st.sampled_from(["[" * 5000, '[["ViT-L/14", 768]]', '[["", 0]]', '{"name": 1}', '{"dim": 1e999}']),
    st.text(max_size=20),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=4,
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)


def safetensors_file(header: Any, data: bytes) -> bytes:
    """8 bytes of length, JSON, data. Half a surrogate pair becomes the bytes a careless writer would leave."""
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a sound safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, first: int = 2048) -> bytes:
    """A sound file with some bytes changed, mostly near its start, cut short, prolonged or in two parts."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.one_of(st.integers(0, min(first, len(content)) - 1), st.integers(0, len(content) - 1)))
        changed[place] = draw(st.integers(0, 255))
    end = draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    return bytes(changed[:end]) + draw(st.binary(max_size=9))


@st.composite
def damaged_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A sound file whose header's values are exchanged for others: types, shapes, places, names, metadata."""
    header, data = split_file(content)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        if isinstance(entry, dict) and entry and draw(st.booleans()):
            entry[draw(st.one_of(st.sampled_from(sorted(entry)), WORDS))] = draw(
                st.one_of(VALUES, st.lists(NUMBERS, max_size=4), st.sampled_from(sorted(SIZES)))
            )
        elif draw(st.booleans()):
            header[draw(WORDS)] = header.pop(name)
        else:
            header[name] = draw(VALUES)
        if not header:
            break
    return safetensors_file(header, data)


@st.composite
def odd_content(draw: st.DrawFn, names: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """A sound safetensors file with tensors of known names but any small shape and type, and odd metadata."""
    chosen = draw(st.lists(st.one_of(st.sampled_from(list(names)), st.text(max_size=8)), max_size=8, unique=True))
    header: dict[str, Any] = {}
    end = 0
    for name in chosen:
        kind, shape = draw(st.sampled_from(sorted(SIZES))), draw(SHAPES)
        size = SIZES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    said = dict(metadata)
    for _ in range(draw(st.integers(0, 3))):
        said[draw(st.one_of(st.sampled_from(sorted(metadata)), WORDS))] = draw(WORDS)
    if draw(st.integers(0, 3)) == 0 and said:
        said.pop(draw(st.sampled_from(sorted(said))))
    header["__metadata__"] = said
    fill = draw(st.sampled_from([b"\x00", b"\x01", b"\x3c", b"\xff"]))
    return safetensors_file(header, fill * end)


def hostile_file(content: bytes) -> st.SearchStrategy[bytes]:
    """All ways in which one sound safetensors file is made hostile."""
    header, _ = split_file(content)
    names = [name for name in header if name != "__metadata__"]
    metadata = header.get("__metadata__") or {"format": "pt"}
    return st.one_of(
        damaged_bytes(content),
        damaged_header(content),
        odd_content(names, metadata),
    )
