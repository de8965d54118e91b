"""Arrow columns to NumPy ones, with a mask of the rows whose value is not what the column must hold.

Every function takes a column of any type. If the type cannot be read as asked, every row that is not null is bad.
Letters: N rows, T tasks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from smes.arm_names import ArmColumn, arm_column, is_arm_name, no_arms
from smes.arrays import I32, I64, Bool
from smes.schema import MISSING
from stream.codec.validation import MAX_FLOAT, MAX_ID

Array = Any  # a pyarrow.Array; pyarrow ships no types


def ids(column: Array) -> tuple[I64, Bool | None]:
    """Int64 values with ``MISSING`` at nulls [N], and the rows [N] that hold no id (None: no such row).

    An integer column of any width is read; the value ``MISSING`` itself is no id. Zero-copy for int64 without nulls.
    """
    if pa.types.is_dictionary(column.type):
        if not _holds_integers(column.type):  # not decoded: one long text may stand in every row
            return np.full(len(column), MISSING, np.int64), _valid(column)
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return np.full(len(column), MISSING, np.int64), None
    if not pa.types.is_integer(column.type):
        return np.full(len(column), MISSING, np.int64), _valid(column)
    if pa.types.is_uint64(column.type):
        unsigned = column.fill_null(0).to_numpy()
        values = np.where(_valid(column), unsigned.astype(np.int64), MISSING)
        return values, unsigned > MAX_ID
    if not pa.types.is_int64(column.type):
        column = column.cast(pa.int64())
    values, nulls = _int64_buffer(column)
    # Counting is one cheap pass; a mask of the sentinels is made only when there are more of them than nulls.
    if np.count_nonzero(values == MISSING) == column.null_count:
        return values, None
    sentinel: Bool = values == MISSING
    return values, sentinel if nulls is None else sentinel & ~nulls


def _int64_buffer(column: Array) -> tuple[I64, Bool | None]:
    """An int64 column with ``MISSING`` at nulls, and where they are; by its buffers, since pyarrow's own
    ``fill_null`` takes several times as long."""
    end = column.offset + len(column)
    validity, data = column.buffers()
    values = np.frombuffer(data, np.int64, end)[column.offset :] if end else np.zeros(0, np.int64)
    if not column.null_count:
        return values, None
    nulls: Bool = np.unpackbits(np.frombuffer(validity, np.uint8), count=end, bitorder="little")[column.offset :] == 0
    return np.where(nulls, MISSING, values), nulls


def floats(column: Array) -> tuple[NDArray[np.float32] | NDArray[np.float64], Bool | None]:
    """Values with NaN at nulls [N], and the rows that hold no finite float32 (NaN counts as null)."""
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan, np.float32), None
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        return np.full(len(column), np.nan, np.float32), _valid(column)
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype != np.float32:
        values = values.astype(np.float64)
    bad: Bool = np.abs(values) > MAX_FLOAT
    if not bad.any():
        return values, None
    return np.where(bad, np.nan, values).astype(values.dtype), bad


@dataclass(frozen=True, slots=True)
class Bags:
    """Ragged ids: row i holds ``values[starts[i] : starts[i] + lengths[i]]``; a null bag has length 0.

    Attributes:
        values: int64, elements of all bags.
        starts, lengths: int64 [N].
        bad: bool [N], rows that hold no bag of ids; None: no such row.
    """

    values: I64
    starts: I64
    lengths: I64
    bad: Bool | None


def bags(column: Array) -> Bags:
    """A list column of integers; a null element is not an id.

    Elements that can be no ids are never made: a list of nulls claims two billion of them in no bytes at all.
    """
    n = len(column)
    kind = column.type
    no_ids = np.zeros(0, np.int64)
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        starts = (column.offset + np.arange(n, dtype=np.int64)) * size
        lengths = np.where(_valid(column), size, 0).astype(np.int64)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = column.offsets.to_numpy().astype(np.int64)
        starts, lengths = offsets[:-1], np.diff(offsets)
        if column.null_count:
            lengths = np.where(_valid(column), lengths, 0)
    else:
        bad = None if pa.types.is_null(kind) else _valid(column)
        return Bags(no_ids, np.zeros(n, np.int64), np.zeros(n, np.int64), bad)
    if not _holds_integers(kind.value_type):
        filled = lengths > 0
        return Bags(no_ids, np.zeros(n, np.int64), np.zeros(n, np.int64), filled if filled.any() else None)
    first, end = (int(starts[0]), int((starts + lengths).max())) if n else (0, 0)
    values, bad_elements = ids(column.values[first:end])  # batches may share a dictionary: only what is theirs
    starts = starts - first
    null_elements = values == MISSING
    bad_elements = null_elements if bad_elements is None else bad_elements | null_elements
    if not bad_elements.any():
        return Bags(values, starts, lengths, None)
    # How many bad elements lie before each: a bag is bad if there are more before its end than before its start.
    before = np.concatenate([[0], np.cumsum(bad_elements)])
    bad_rows: Bool = before[starts + lengths] > before[starts]
    return Bags(values, starts, lengths, bad_rows if bad_rows.any() else None)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_numbers(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _holds_integers(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind))


def scores(column: Array, num_tasks: int) -> tuple[NDArray[np.float32], Bool | None]:
    """Float32 [N, T] from a list column with T numbers a row, NaN at nulls; and the rows that hold no such list."""
    n = len(column)
    out = np.full((n, num_tasks), np.nan, np.float32)
    if pa.types.is_null(column.type):
        return out, None
    valid = _valid(column)
    if not _is_list(column.type) or not _holds_numbers(column.type.value_type):
        return out, valid
    if pa.types.is_fixed_size_list(column.type) and column.type.list_size == num_tasks:
        values, bad = floats(column.values[column.offset * num_tasks : (column.offset + n) * num_tasks])
        out[valid] = values.reshape(n, num_tasks)[valid]
        return out, None if bad is None else bad.reshape(n, num_tasks).any(axis=1) & valid
    if pa.types.is_fixed_size_list(column.type):
        return out, valid
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    right = valid & (lengths == num_tasks)
    values, bad = floats(column.filter(pa.array(right)).flatten())
    out[right] = values.reshape(-1, num_tasks)
    wrong = valid & ~right
    if bad is not None:
        wrong[right] = bad.reshape(-1, num_tasks).any(axis=1)
    return out, wrong


def arms(column: Array) -> tuple[ArmColumn, Bool | None]:
    """The arm of each row by its name, none at nulls; and the rows [N] that hold another text, or no text."""
    n = len(column)
    if pa.types.is_null(column.type) or n == 0:
        return no_arms(n), None
    if not pa.types.is_dictionary(column.type):
        if not _is_text(column.type):
            return no_arms(n), _valid(column)
        column = column.dictionary_encode()
    if not _is_text(column.dictionary.type):
        return no_arms(n), _valid(column)
    indices = column.indices.cast(pa.int64()).fill_null(-1).to_numpy()
    texts = column.dictionary
    if len(texts) > n:  # batches may share a large dictionary: only what is theirs is made
        used, indices = np.unique(np.append(indices, -1), return_inverse=True)
        texts, indices = texts.take(pa.array(used[1:])), indices[:n] - 1
    # As bytes: Arrow does not promise that a text is UTF-8. At the end is what stands for null.
    kind = pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary()
    names = [None if text is None else text.decode("latin-1") for text in texts.view(kind).to_pylist()]
    names.append(None)
    good = [name is None or is_arm_name(name) for name in names]
    arm_N = arm_column([name if is_good else None for name, is_good in zip(names, good, strict=True)])
    bad: Bool = ~np.array(good)[indices]
    return arm_N[indices], bad if bad.any() else None


def task_indices(column: Array, index: dict[str, int]) -> I32:
    """Int32 [N]: the task of each row by name, -1 where the name is null or no task's.

    The names travel with the rows, as a dictionary or as plain strings, so no numbering has to agree.
    """
    if not pa.types.is_dictionary(column.type):
        if not _is_text(column.type):
            return np.full(len(column), -1, np.int32)
        column = column.dictionary_encode()
    names = column.dictionary
    if not _is_text(names.type):
        return np.full(len(column), -1, np.int32)
    tasks = pc.index_in(names, value_set=pa.array(index, names.type))  # the tasks' names, in their order
    task_of = np.append(tasks.fill_null(-1).to_numpy().astype(np.int32), np.int32(-1))
    indices = column.indices.cast(pa.int64()).fill_null(-1)  # in their own type, no other value may be left for null
    return task_of[indices.to_numpy()] if len(column) else np.zeros(0, np.int32)


def _valid(column: Array) -> Bool:
    valid: Bool = column.is_valid().to_numpy(zero_copy_only=False)
    return valid
