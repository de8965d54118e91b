"""An Arrow IPC stream from the event log, read without trusting it."""

import struct
from typing import Any

import pyarrow as pa

from stream.validation import Problem

RecordBatch = Any  # a pyarrow.RecordBatch; pyarrow ships no types

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# What pyarrow raises for bytes that are no valid stream: its exceptions derive from many built-in ones.
_DAMAGED = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError, struct.error)

# Slots of the flatbuffer tables in Arrow's Message.fbs.
_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER = 1, 2
_RECORD_BATCH_COMPRESSION = 3
_DICTIONARY_BATCH_DATA = 1
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def read_batches(value: bytes) -> list[RecordBatch] | Problem:
    """The record batches of a stream, zero-copy over ``value``.

    A stream without its end marker is refused, since rows may be missing, and so is a compressed one: a small record
    could claim any amount of memory (let the broker compress). Columns that are read must still pass
    :func:`column_problem`.
    """
    if not value.endswith(_END_OF_STREAM):
        return Problem("unparsable", "expected an Arrow IPC stream that ends with its end-of-stream marker")
    try:
        for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(value)):
            if _is_compressed(message.metadata.to_pybytes()):
                return Problem("unparsable", "expected an uncompressed Arrow IPC stream, came a compressed one")
        with pa.ipc.open_stream(pa.py_buffer(value)) as reader:
            batches = list(reader)
            assert all(isinstance(name, str) for name in reader.schema.names)  # names that are no UTF-8 raise here
        for batch in batches:
            batch.validate()
    except _DAMAGED as error:
        return Problem("unparsable", f"expected an Arrow IPC stream: {str(error)[:200]}")
    return batches


def column_problem(column: Any, name: str) -> Problem | None:
    """Whether reading the column's values would leave its buffers (offsets, dictionary indices, UTF-8)."""
    try:
        column.validate(full=True)
    except _DAMAGED as error:
        return Problem("unparsable", f"{name}: expected a valid Arrow column: {str(error)[:200]}", name)
    return None


def _is_compressed(metadata: bytes) -> bool:
    message = struct.unpack_from("<I", metadata)[0]
    kind_at = _slot(metadata, message, _MESSAGE_HEADER_TYPE)
    kind = metadata[kind_at] if kind_at else 0
    if kind not in (_RECORD_BATCH, _DICTIONARY_BATCH):
        return False
    batch = _table(metadata, message, _MESSAGE_HEADER)
    if kind == _DICTIONARY_BATCH:
        batch = _table(metadata, batch, _DICTIONARY_BATCH_DATA)
    return _slot(metadata, batch, _RECORD_BATCH_COMPRESSION) != 0


def _slot(data: bytes, table: int, slot: int) -> int:
    """Position of a field of a flatbuffer table; 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    entry = 4 + 2 * slot
    if entry >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", data, vtable + entry)[0]
    return table + int(offset) if offset else 0


def _table(data: bytes, table: int, slot: int) -> int:
    at = _slot(data, table, slot)
    return at + int(struct.unpack_from("<I", data, at)[0])
