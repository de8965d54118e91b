"""Arrow records from the event log, opened without trusting them.

Whatever the bytes are, nothing outside them is read and no more memory is taken than they could fill; a record that is
damaged, compressed, without a required column or with too many rows becomes a dead letter. What costs no bytes on the
wire but memory here is refused or never made: columns of nulls, runs, dictionaries that grow from batch to batch.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from smes.arrays import I64
from stream.codec.limits import MAX_ROWS
from stream.codec.validation import Code, Problem
from stream.dead_letters import DeadLetter
from stream.log.event_log import Record

RecordBatch = Any  # a pyarrow.RecordBatch; pyarrow ships no types

# Most characters of a text that a refused row's letter keeps: no good row holds more than the name of a task.
_MAX_TEXT = 1_000

_MAX_MESSAGES = 2_048  # batches and dictionaries of a record; each costs as much work as thousands of rows

_PLAIN = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_temporal,
)
REQUEST = "request"
"""The column of what impressions share with others of their request: a dictionary of structs of columns."""

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# What pyarrow raises for bytes that are no valid stream: its exceptions derive from many built-in ones.
_DAMAGED = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError, struct.error)

# Slots of the flatbuffer tables in Arrow's Message.fbs.
_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER = 1, 2
_RECORD_BATCH_COMPRESSION = 3
_DICTIONARY_BATCH_DATA, _DICTIONARY_BATCH_DELTA = 1, 2
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


@dataclass(frozen=True, slots=True)
class Part:
    """One record batch of a record.

    Attributes:
        record: Where it was read from.
        first_row: Its first row within the record.
        num_rows: At least 1.
        num_columns: All columns, known or not, those of requests with them.
        columns: The known columns by name; reading them is safe.
        requests: What rows share with others; None: nothing.
    """

    record: Record
    first_row: int
    num_rows: int
    num_columns: int
    columns: dict[str, Any]
    requests: "RequestColumns | None" = None

    def cells(self, row: int, max_elements: int) -> dict[str, Any]:
        """A row as plain data; of a list, the first ``max_elements``."""
        return {name: _plain(column[row], max_elements) for name, column in self.columns.items()}

    def shared_cells(self, row: int, max_elements: int) -> dict[str, Any] | None:
        """What a row shares with others, likewise; None where it has no request."""
        if self.requests is None or (number := int(self.requests.of_row[row])) < 0:
            return None
        return {name: _plain(column[number], max_elements) for name, column in self.requests.columns.items()}


@dataclass(frozen=True, slots=True)
class RequestColumns:
    """What rows share with others of their request.

    Attributes:
        of_row: int64 [N], each row's request, -1 where it has none.
        num_requests: R.
        num_columns: All columns, known or not.
        columns: The known columns by name, R rows each; reading them is safe.
    """

    of_row: I64
    num_requests: int
    num_columns: int
    columns: dict[str, Any]


def record_parts(
    record: Record,
    known: Sequence[str],
    required: dict[str, Code],
    dead: list[DeadLetter],
    max_rows: int = MAX_ROWS,
    shareable: Sequence[str] = (),
) -> list[Part]:
    """The record's batches that have rows; a record that cannot be read at all goes to ``dead``.

    Args:
        record: An Arrow record.
        known: Names of the columns to keep.
        required: Column that every batch must have → the reason code where its type is wrong.
        dead: Where the letter goes.
        max_rows: Most rows of a good record.
        shareable: Names of the columns that rows may share, in the column ``REQUEST``, required ones among them.
    """
    batches = _read_batches(record.value)
    if isinstance(batches, Problem):
        dead.append(DeadLetter.of_record(record, batches))
        return []
    if (rows := sum(batch.num_rows for batch in batches)) > max_rows:
        too_large = Problem("too_large", f"record: {rows} rows, expected at most {max_rows} with this schema")
        dead.append(DeadLetter.of_record(record, too_large, events=_credible_rows(batches, record)))
        return []
    parts: list[Part] = []
    first_row = 0
    for batch in batches:
        position = {name: i for i, name in enumerate(batch.schema.names)}
        columns = {name: batch.column(position[name]) for name in known if name in position}
        shared = _requests_of(batch.column(position[REQUEST]), shareable) if shareable and REQUEST in position else None
        checked = shared if isinstance(shared, Problem) else _structure_problem(columns, required, shared)
        if isinstance(shared, Problem) or checked is not None:
            assert checked is not None
            dead.append(DeadLetter.of_record(record, checked, events=_credible_rows(batches, record)))
            return []
        if batch.num_rows:
            width = batch.num_columns if shared is None else batch.num_columns - 1 + shared.num_columns
            parts.append(Part(record, first_row, batch.num_rows, width, columns, shared))
        first_row += batch.num_rows
    return parts


def _requests_of(column: Any, shareable: Sequence[str]) -> RequestColumns | Problem | None:
    """What rows share with others; None if there is nothing."""
    if pa.types.is_null(column.type):
        return None
    if not pa.types.is_dictionary(column.type) or not pa.types.is_struct(column.type.value_type):
        return Problem("bad_type", f"{REQUEST}: expected a dictionary of structs", REQUEST)
    structs = column.dictionary
    try:
        position = {structs.type[i].name: i for i in range(structs.type.num_fields)}
    except _DAMAGED:  # a name that is no UTF-8
        return Problem("unparsable", f"{REQUEST}: expected names of fields in UTF-8", REQUEST)
    names = [name for name in shareable if name in position]
    for name in names:
        if not _is_plain(kind := structs.type[position[name]].type) or pa.types.is_dictionary(kind):
            return Problem("bad_type", f"{REQUEST}.{name}: expected plain values or lists of them", name)
    if problem := _column_problem(column, REQUEST):
        return problem
    of_row = column.indices.cast(pa.int64()).fill_null(-1).to_numpy()
    used = of_row[of_row >= 0]
    first, last = (int(used.min()), int(used.max())) if len(used) else (0, -1)
    count = last + 1 - first
    if count > len(column):  # a request costs no bytes on the wire if all of it is null
        reason = (
            f"{REQUEST}: {count} requests from the first to the last of {len(column)} rows, expected no more than rows"
        )
        return Problem("too_large", reason, REQUEST)
    fields = structs.slice(first, count).flatten()  # null where a whole struct is null
    columns = {name: fields[position[name]] for name in names}
    return RequestColumns(np.where(of_row < 0, -1, of_row - first), count, len(fields), columns)


def _structure_problem(
    columns: dict[str, Any], required: dict[str, Code], shared: RequestColumns | None
) -> Problem | None:
    """What makes every row of a batch bad: a required column that is absent or of the wrong type, or damage."""
    of_requests = {} if shared is None else shared.columns
    for name, code in required.items():
        there = [each[name] for each in (columns, of_requests) if name in each]
        if all(pa.types.is_null(column.type) for column in there):
            got = "a column of nulls" if there else "no such column"
            return Problem("missing_field", f"{name}: expected a column, got {got}", name)
        for column in there:
            expected, good = _expected_type(name, column.type)
            if not good and not pa.types.is_null(column.type):
                return Problem(code, f"{name}: expected {expected} column, got {column.type!s:.60}", name)
    for name, column in columns.items():  # those of requests were looked at
        if not _is_plain(column.type):
            return Problem("bad_type", f"{name}: expected numbers or lists of them, got {column.type!s:.60}", name)
        problem = _column_problem(column, name)
        if problem:
            return problem
    return None


def _is_plain(kind: Any, *, in_list: bool = False) -> bool:
    """Whether a column of the type may be looked at row by row, if only to refuse its rows.

    Views, runs, unions, structs and lists of lists have uses, but none in an event. On some types pyarrow raises; asked
    which rows of a dictionary of nulls are valid, it ends the process.
    """
    if pa.types.is_dictionary(kind):
        values = kind.value_type
        return not (pa.types.is_null(values) or pa.types.is_nested(values)) and _is_plain(values)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return not in_list and _is_plain(kind.value_type, in_list=True)
    return any(is_kind(kind) for is_kind in _PLAIN)


def _expected_type(name: str, kind: Any) -> tuple[str, bool]:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if name == "task":
        return "a string", pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if name == "value":
        return "a float32", pa.types.is_floating(kind) or pa.types.is_integer(kind)
    return "an int64", pa.types.is_integer(kind)


def _credible_rows(batches: Sequence[RecordBatch], record: Record) -> int:
    """How many events a refused record stands for: its rows, or 1 where it claims more rows than it has bits."""
    rows = sum(batch.num_rows for batch in batches)
    return rows if 0 < rows <= 8 * len(record.value) else 1


def placed(parts: Sequence[Part]) -> Iterator[tuple[Part, slice]]:
    """Each part with the rows that it has in the block of all parts."""
    start = 0
    for part in parts:
        yield part, slice(start, start + part.num_rows)
        start += part.num_rows


def _read_batches(value: bytes) -> list[RecordBatch] | Problem:
    """The record batches of a stream, zero-copy over ``value``.

    A stream without its end marker is refused, since rows may be missing. So is a compressed one, and one with delta
    dictionaries, of which every batch keeps its own copy: a small record could claim any amount of memory (let the
    broker compress). Columns that are read must still pass :func:`_column_problem`.
    """
    if not value.endswith(_END_OF_STREAM):
        return Problem("unparsable", "expected an Arrow IPC stream that ends with its end-of-stream marker")
    try:
        for count, message in enumerate(pa.ipc.MessageReader.open_stream(pa.py_buffer(value))):
            if count > _MAX_MESSAGES:
                return Problem("too_large", f"record: more than {_MAX_MESSAGES} Arrow messages, expected fewer")
            metadata = message.metadata.to_pybytes()
            if _is_compressed(metadata):
                return Problem("unparsable", "expected an uncompressed Arrow IPC stream, got a compressed one")
            if _is_delta(metadata):
                return Problem("unparsable", "expected whole dictionaries in an Arrow IPC stream, got a delta")
        with pa.ipc.open_stream(pa.py_buffer(value)) as reader:
            batches = list(reader)
            assert all(isinstance(name, str) for name in reader.schema.names)  # names that are no UTF-8 raise here
        for batch in batches:
            batch.validate()
    except _DAMAGED as error:
        return Problem("unparsable", f"expected an Arrow IPC stream: {str(error)[:200]}")
    return batches


def _column_problem(column: Any, name: str) -> Problem | None:
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


def _is_delta(metadata: bytes) -> bool:
    message = struct.unpack_from("<I", metadata)[0]
    kind_at = _slot(metadata, message, _MESSAGE_HEADER_TYPE)
    if not kind_at or metadata[kind_at] != _DICTIONARY_BATCH:
        return False
    delta_at = _slot(metadata, _table(metadata, message, _MESSAGE_HEADER), _DICTIONARY_BATCH_DELTA)
    return delta_at != 0 and metadata[delta_at] != 0


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


def _plain(scalar: Any, max_elements: int) -> Any:
    """A cell as plain data, long text and lists cut before they are made; a type that no event has, as its name."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    try:
        if pa.types.is_dictionary(kind):
            return _plain(scalar.value, max_elements)
        if isinstance(scalar, pa.ListScalar) and not pa.types.is_nested(kind.value_type):
            return [_plain(element, max_elements) for element in scalar.values[:max_elements]]
        if isinstance(scalar, pa.BinaryScalar):  # texts, too
            start = memoryview(scalar.as_buffer())[: 4 * _MAX_TEXT].tobytes()
            is_text = isinstance(scalar, pa.StringScalar)
            return start.decode(errors="ignore")[:_MAX_TEXT] if is_text else start[:_MAX_TEXT]
        if pa.types.is_primitive(kind) or pa.types.is_decimal(kind):
            return scalar.as_py()
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        pass
    return f"<{kind!s:.60}>"
