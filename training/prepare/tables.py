"""Stage results on disk: one Parquet file per stage and shard, which carries its own fingerprint."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.storage import Store

Row = dict[str, Any]
FINGERPRINT, CONTENT = b"fusedid.fingerprint", b"fusedid.content"
DROP_FIELDS = [("reason", pa.string()), ("detail", pa.string())]
LOCATION = pa.struct([("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
FLOATS = pa.list_(pa.float32())


def table_path(stage: str, shard: int) -> str:
    """Where a stage keeps a shard's result."""
    return f"work/{stage}/{shard:06d}.parquet"


def content_digest(table: pa.Table) -> str:
    """sha256 of the table's values and types; independent of compression and chunking."""
    sink = io.BytesIO()
    # A slice still carries bits of its neighbours in its buffers; take copies only what belongs to it.
    table = table.replace_schema_metadata(None).take(pa.array(range(table.num_rows), pa.int64())).combine_chunks()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def to_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows to a table; missing columns are null, unknown ones are our own bug."""
    known = set(schema.names)
    for row in rows:
        if not known.issuperset(row):
            raise AssertionError(f"columns {sorted(set(row) - known)} are not in the schema")
    return pa.Table.from_pylist(list(rows), schema=schema)


def to_parquet(table: pa.Table, metadata: dict[bytes, bytes] | None = None) -> bytes:
    """Parquet bytes; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata or None), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, or some columns of it.

    Without Arrow's threads: files are small, workers many, and a thread that an interrupted run leaves behind aborts
    the process when it ends.
    """
    return pq.ParquetFile(io.BytesIO(data)).read(columns=list(columns) if columns else None, use_threads=False)


def write_result(store: Store, stage: str, shard: int, table: pa.Table, fingerprint: str) -> None:
    """Write a stage's result for one shard, atomically."""
    metadata = {FINGERPRINT: fingerprint.encode(), CONTENT: content_digest(table).encode()}
    store.write(table_path(stage, shard), to_parquet(table, metadata))


def read_result(store: Store, stage: str, shard: int) -> pa.Table:
    """A stage's result for one shard."""
    return from_parquet(store.read(table_path(stage, shard)))


def read_all(store: Store, stage: str, count: int, columns: Sequence[str] | None = None) -> pa.Table:
    """A stage's results for the first ``count`` shards, one after the other."""
    parts = [from_parquet(store.read(table_path(stage, shard)), columns) for shard in range(count)]
    return pa.concat_tables(part.replace_schema_metadata(None) for part in parts)


def read_marks(store: Store, stage: str, shard: int) -> tuple[str, str] | None:
    """(fingerprint, content digest) of a result on disk; None when there is none or the file is damaged."""
    try:
        with store.open(table_path(stage, shard)) as file:
            metadata = pq.read_schema(file).metadata or {}
    except (FileNotFoundError, pa.ArrowException):
        return None
    if FINGERPRINT not in metadata or CONTENT not in metadata:
        return None
    return metadata[FINGERPRINT].decode(), metadata[CONTENT].decode()
