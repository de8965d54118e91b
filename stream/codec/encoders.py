"""Event blocks to wire records: JSON, one event a record, or Arrow, one IPC stream a partition.

Letters: N rows, R requests.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from smes.arm_names import names_of
from smes.arrays import F32, I64, Bool
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import ITEM_ID, MISSING, USER_ID, Schema
from stream.codec.arrow_form import FEATURE_PREFIX
from stream.codec.arrow_stream import REQUEST


def json_impressions(block: ImpressionBlock, schema: Schema) -> Iterator[dict[str, Any]]:
    """One event in its JSON form per row; what is missing is left out."""
    singles = [f.name for f in schema.id_features[2:] if f.kind == "id"]
    bags = [f.name for f in schema.id_features if f.is_list]
    numerics = [f.name for f in schema.numeric_features]
    tasks = [t.name for t in schema.tasks]
    columns = (
        zip(block.impression_id.tolist(), block.event_time_ms.tolist(), strict=True),
        block.request_id.tolist(),
        block.ids[:, :2].tolist(),
        block.ids[:, [schema.id_slices[name].start for name in singles]].tolist(),
        zip(*(block.ids[:, schema.id_slices[name]].tolist() for name in bags), strict=True) if bags else repeat(()),
        block.numerics.tolist(),
        block.served_version.tolist(),
        block.served_scores.tolist(),
        names_of(block.served_arm),
    )
    rows = zip(*columns, strict=False)  # without bags one of the columns has no end
    for (impression_id, time_ms), request_id, entities, ids, id_bags, numbers, version, scores, arm in rows:
        event: dict[str, Any] = {"impression_id": impression_id, **_ids((USER_ID, ITEM_ID), entities)}
        event["event_time_ms"] = time_ms
        event |= _ids(("request_id",), (request_id,))
        features: dict[str, Any] = _ids(singles, ids)
        for name, bag in zip(bags, id_bags, strict=True):
            present = [value for value in bag if value != MISSING]
            if present:
                features[name] = present
        event["features"] = features | _numbers(numerics, numbers)
        served: dict[str, Any] = {} if arm is None else {"arm": arm}
        served |= _ids(("version",), (version,))
        present_scores = _numbers(tasks, scores)
        if present_scores:
            served["scores"] = present_scores
        if served:
            event["served"] = served
        yield event


def json_feedback(block: FeedbackBlock, schema: Schema) -> Iterator[bytes]:
    """One JSON event per row."""
    names = [t.name for t in schema.tasks]
    encode = msgspec.json.Encoder().encode
    columns = (block.impression_id, block.event_time_ms, block.task, block.value)
    for impression_id, event_time_ms, task, value in zip(*(c.tolist() for c in columns), strict=True):
        event = {"impression_id": impression_id, "event_time_ms": event_time_ms, "task": names[task], "value": value}
        yield encode(event)


def begins(request_id: I64) -> Bool:
    """Which rows are not of the request of the row before. int64 [N] → bool [N]."""
    first: Bool = np.ones(len(request_id), np.bool_)
    first[1:] = (request_id[1:] != request_id[:-1]) | (request_id[1:] == MISSING)
    return first


def arrow_impressions(block: ImpressionBlock, schema: Schema, *, by_request: bool = False) -> bytes:
    """All rows as one IPC stream.

    Args:
        block: The rows.
        schema: Features and tasks.
        by_request: Whether columns that are the same in all rows of each request stand once for the request.
    """
    fields, first = impression_fields(block, schema), begins(block.request_id)
    given: dict[str, Any] = {}
    if by_request and not first.all():
        same = [name for name, values in fields.items() if name != "impression_id" and _is_same(values, ~first)]
        given = as_columns({name: fields.pop(name)[first] for name in same}, schema)
    columns = as_columns(fields, schema)
    if "served_arm" in columns:
        columns["served_arm"] = columns["served_arm"].dictionary_encode()
    if given:
        number = (np.cumsum(first) - 1).astype(np.min_scalar_type(-int(first.sum())))
        struct = pa.StructArray.from_arrays(list(given.values()), list(given))
        columns[REQUEST] = pa.DictionaryArray.from_arrays(pa.array(number), struct)
    return ipc_stream(columns)


def impression_fields(block: ImpressionBlock | ExampleBlock, schema: Schema) -> dict[str, NDArray[Any]]:
    """The name of each column → its values, [N] or [N, L]."""
    fields: dict[str, NDArray[Any]] = {
        "impression_id": block.impression_id,
        USER_ID: block.user_id,
        ITEM_ID: block.ids[:, 1],
        "event_time_ms": block.event_time_ms,
        "request_id": block.request_id,
    }
    for feature in schema.id_features[2:]:
        values = block.ids[:, schema.id_slices[feature.name]]
        fields[FEATURE_PREFIX + feature.name] = values if feature.is_list else values[:, 0]
    for i, feature in enumerate(schema.numeric_features):
        fields[FEATURE_PREFIX + feature.name] = block.numerics[:, i]
    fields["served_version"] = block.served_version
    fields["served_scores"] = block.served_scores
    fields["served_arm"] = block.served_arm
    return fields


def _is_same(values: NDArray[Any], as_before: Bool) -> bool:
    """Whether each of these rows has the value of the row before."""
    after, before = values[1:][as_before[1:]], values[:-1][as_before[1:]]
    return bool(((after == before) | (after != after) & (before != before)).all())


def as_columns(fields: dict[str, NDArray[Any]], schema: Schema) -> dict[str, Any]:
    """Fields as Arrow columns."""
    bags = {FEATURE_PREFIX + feature.name for feature in schema.id_features if feature.is_list}
    columns: dict[str, Any] = {}
    for name, values in fields.items():
        if name == "served_scores":
            flat = nullable(values.reshape(-1))
            unscored = pa.array(np.isnan(values).all(axis=1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, schema.num_tasks, mask=unscored)
        elif name == "served_arm":
            columns[name] = pa.array(names_of(values), pa.string())
        elif name in bags:
            columns[name] = _bags(values)
        else:
            columns[name] = nullable(values)
    return columns


def arrow_feedback(block: FeedbackBlock, schema: Schema) -> bytes:
    """All rows as one IPC stream."""
    names = pa.array([t.name for t in schema.tasks], pa.string())
    return ipc_stream(
        {
            "impression_id": pa.array(block.impression_id),
            "event_time_ms": pa.array(block.event_time_ms),
            "task": pa.DictionaryArray.from_arrays(pa.array(block.task), names),
            "value": pa.array(block.value),
        }
    )


def single_row(value: bytes, row: int) -> bytes:
    """An Arrow record with one row of another one's, whose columns may be any.

    Raises:
        pyarrow.ArrowException: The record cannot be read.
    """
    with pa.ipc.open_stream(pa.py_buffer(value)) as reader:
        table = reader.read_all()
    one = table.slice(row, 1)
    for i, column in enumerate(one.columns):
        if pa.types.is_dictionary(column.type) and len(column):
            one = one.set_column(i, one.schema.field(i), pa.chunked_array(map(_own, column.chunks), column.type))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(one)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def _own(column: Any) -> Any:
    """A dictionary column of one row, whose dictionary has no other row's value: not what other requests share."""
    at = column.indices[0].as_py()
    there = at is not None and 0 <= at < len(column.dictionary)  # columns that no event has were never checked
    index = pa.array([0 if there else None], column.type.index_type)
    values = column.dictionary.slice(at, 1) if there else column.dictionary.slice(0, 0)
    return pa.DictionaryArray.from_arrays(index, values, ordered=column.type.ordered)


def require_finite(name: str, values: F32) -> None:
    """Refuse infinities before they reach a wire form that cannot carry them; NaN stands for absent.

    Raises:
        ValueError: There is one; its row is named.
    """
    infinite = np.argwhere(np.isinf(values))
    if len(infinite):
        row = infinite[0, 0]
        raise ValueError(f"{name}: expected finite numbers (NaN where absent), got an infinity in row {row}")


def _ids(names: Sequence[str], values: Sequence[int]) -> dict[str, int]:
    return {name: value for name, value in zip(names, values, strict=True) if value != MISSING}


def _numbers(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {name: value for name, value in zip(names, values, strict=True) if value == value}


def nullable(values: I64 | F32) -> Any:
    """An Arrow column, null where a value is absent."""
    absent = np.isnan(values) if values.dtype.kind == "f" else values == MISSING
    return pa.array(np.ascontiguousarray(values), mask=absent if absent.any() else None)


def _bags(values_NL: I64) -> Any:
    present = values_NL != MISSING
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_NL[present]))


def ipc_stream(columns: dict[str, Any]) -> bytes:
    """Columns as one IPC stream of one batch."""
    batch = pa.RecordBatch.from_pydict(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded
