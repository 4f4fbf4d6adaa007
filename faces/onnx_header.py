"""What an ONNX file takes and gives, read without onnx or onnxruntime and without loading its weights.

ONNX is a protocol-buffer file. Only the few fields below are visited, everything else is skipped by seeking, so that a
folder of face packs is listed in milliseconds. Field numbers are those of the published ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
NODE_NAME, NODE_OP = 3, 4
TENSOR_NAME = 8
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 1
LONGEST_NAME = 4096
FIRST_NODES = 8


@dataclass(frozen=True)
class OnnxHeader:
    inputs: dict[str, tuple[int | None, ...]]
    """Shape by name, weights excluded; None for a free axis."""
    outputs: dict[str, tuple[int | None, ...]]
    first_nodes: tuple[tuple[str, str], ...]
    """(name, operator) of the first eight nodes."""


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    value: int
    """The number itself for a varint, else where the bytes begin."""
    end: int


def read_header(path: Path) -> OnnxHeader:
    """Header of an ONNX file. ``ValueError`` when it is none; ``OSError`` when it cannot be read."""
    with path.open("rb") as file:
        size = path.stat().st_size
        for field in _fields(file, 0, size):
            if field.number == MODEL_GRAPH and field.wire == BYTES:
                return _read_graph(file, field)
    raise ValueError(f"{path.name} is not an ONNX model (no graph in it); download the file again")


def _read_graph(file: BinaryIO, graph: _Field) -> OnnxHeader:
    inputs: dict[str, tuple[int | None, ...]] = {}
    outputs: dict[str, tuple[int | None, ...]] = {}
    weights: set[str] = set()
    nodes: list[tuple[str, str]] = []
    for field in _fields(file, graph.value, graph.end):
        if field.number == GRAPH_NODE and len(nodes) < FIRST_NODES:
            nodes.append((_text(file, field, NODE_NAME), _text(file, field, NODE_OP)))
        elif field.number == GRAPH_INITIALIZER:
            weights.add(_text(file, field, TENSOR_NAME))
        elif field.number in (GRAPH_INPUT, GRAPH_OUTPUT):
            target = inputs if field.number == GRAPH_INPUT else outputs
            target[_text(file, field, VALUE_NAME)] = _shape(file, field)
    # Old exporters list every weight among the inputs too.
    real_inputs = {name: shape for name, shape in inputs.items() if name not in weights}
    return OnnxHeader(real_inputs, outputs, tuple(nodes))


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[_Field]:
    position = start
    while position < end:
        file.seek(position)
        tag = _varint(file)
        number, wire = tag >> 3, tag & 7
        value = _varint(file) if wire in (VARINT, BYTES) else 0
        position = file.tell()
        if wire == VARINT:
            yield _Field(number, wire, value, position)
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(wire, value if wire == BYTES else -1)
        if number == 0 or length < 0 or position + length > end:
            raise ValueError("not an ONNX model: the file is damaged or of another kind; download it again")
        yield _Field(number, wire, position, position + length)
        position += length


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("not an ONNX model: the file is damaged or of another kind; download it again")


def _child(file: BinaryIO, parent: _Field, number: int) -> _Field | None:
    if parent.wire != BYTES:
        return None
    return next((field for field in _fields(file, parent.value, parent.end) if field.number == number), None)


def _text(file: BinaryIO, parent: _Field, number: int) -> str:
    field = _child(file, parent, number)
    if field is None or field.wire != BYTES:
        return ""
    file.seek(field.value)
    return file.read(min(field.end - field.value, LONGEST_NAME)).decode("utf-8", "replace")


def _shape(file: BinaryIO, value_info: _Field) -> tuple[int | None, ...]:
    field: _Field | None = value_info
    for number in (VALUE_TYPE, TYPE_TENSOR, TENSOR_SHAPE):
        field = _child(file, field, number) if field is not None else None
    if field is None or field.wire != BYTES:
        return ()
    return tuple(_axis(file, dim) for dim in _fields(file, field.value, field.end) if dim.number == SHAPE_DIM)


def _axis(file: BinaryIO, dim: _Field) -> int | None:
    value = _child(file, dim, DIM_VALUE)
    return value.value if value is not None and value.wire == VARINT else None
