"""The compiled loops of the table in the host's memory. Each passes once over the rows that it touches.

The records lie one behind the other in one flat array. A batch reads them at random, so each loop asks for the records
that it will need a little later.

Letters: R rows of the table, X floats of a record, U distinct rows of a batch, B instances, W id columns, N cells or
rows, G groups of columns, C columns of a group, S columns of all groups, L records in an undo log.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import F32, I32, I64
from smes.lanes import LANES, adagrad8, add8, copy8, square8, subtract8
from smes.prefetch import prefetch

U64 = NDArray[np.uint64]

_U = np.uint64
_AHEAD = 16  # rows
_LINE = np.uint64(16)  # floats of a cache line


class Columns(NamedTuple):
    """Where the groups' columns are in a record, and how they learn. One element a group.

    Attributes:
        weight_G: int64, the first weight.
        columns_G: int64, C.
        accumulator_G: int64, the first accumulator.
        row_wise_G: bool, whether there is one accumulator for all columns.
        rate_G: float32, learning rate.
        first_G: float32, first value of the accumulators.
    """

    weight_G: I64
    columns_G: I64
    accumulator_G: I64
    row_wise_G: NDArray[np.bool_]
    rate_G: F32
    first_G: F32


@njit(cache=True, inline="always")
def _fetch(flat: F32, start: np.uint64, length: int) -> None:  # pragma: no cover - compiled
    """Ask for so many floats."""
    at = start
    while at < start + _U(length):
        prefetch(flat, at)
        at += _LINE
    prefetch(flat, start + _U(length - 1))


@njit(cache=True, inline="always")
def _copy(source: F32, at: np.uint64, target: F32, to: np.uint64, length: int) -> None:  # pragma: no cover - compiled
    whole = length - length % LANES
    for b in range(0, whole, LANES):
        copy8(source, at + _U(b), target, to + _U(b))
    for c in range(whole, length):
        target[to + _U(c)] = source[at + _U(c)]


@njit(cache=True, inline="always")
def _add(source: F32, at: np.uint64, target: F32, to: np.uint64, length: int) -> None:  # pragma: no cover - compiled
    whole = length - length % LANES
    for b in range(0, whole, LANES):
        add8(source, at + _U(b), target, to + _U(b))
    for c in range(whole, length):
        target[to + _U(c)] += source[at + _U(c)]


@njit(cache=True, nogil=True)
def read_cells(
    flat: F32, width: int, rows_U: I64, cells_N: I64, columns: Columns, outs: tuple[F32, ...]
) -> None:  # pragma: no cover - compiled
    """Copy, for every cell, the weights of the row that it reads.

    Args:
        flat: The records, float32 [R·X].
        width: X.
        rows_U, cells_N: The rows, and which of them each cell reads.
        columns: The groups.
        outs: Where to, for each group; float32 [N·C].
    """
    num_weights = columns.weight_G[-1] + columns.columns_G[-1]
    for n in range(len(cells_N)):
        if n + _AHEAD < len(cells_N):
            _fetch(flat, _U(rows_U[cells_N[n + _AHEAD]] * width), num_weights)
        record = rows_U[cells_N[n]] * width
        for g in range(len(outs)):
            length = columns.columns_G[g]
            _copy(flat, _U(record + columns.weight_G[g]), outs[g], _U(n * length), length)


@njit(cache=True, nogil=True)
def read_rows(
    flat: F32, width: int, rows_N: I64, columns: Columns, outs: tuple[F32, ...]
) -> None:  # pragma: no cover - compiled
    """Copy the weights of some rows; the arguments are those of :func:`read_cells`."""
    num_weights = columns.weight_G[-1] + columns.columns_G[-1]
    for n in range(len(rows_N)):
        if n + _AHEAD < len(rows_N):
            _fetch(flat, _U(rows_N[n + _AHEAD] * width), num_weights)
        for g in range(len(outs)):
            length = columns.columns_G[g]
            _copy(flat, _U(rows_N[n] * width + columns.weight_G[g]), outs[g], _U(n * length), length)


@njit(cache=True, nogil=True)
def write_rows(
    flat: F32, width: int, rows_N: I64, columns: Columns, weights: tuple[F32, ...]
) -> None:  # pragma: no cover - compiled
    """Give rows weights, float32 [N·C] for each group, and first accumulators."""
    for n in range(len(rows_N)):
        record = rows_N[n] * width
        for g in range(len(weights)):
            length = columns.columns_G[g]
            _copy(weights[g], _U(n * length), flat, _U(record + columns.weight_G[g]), length)
            for a in range(1 if columns.row_wise_G[g] else length):
                flat[record + columns.accumulator_G[g] + a] = columns.first_G[g]


@njit(cache=True, nogil=True)
def add_gradients(
    cells_BW: I64, gradient: F32, strides: tuple[int, int], start: int, length: int, sums_US: F32
) -> None:  # pragma: no cover - compiled
    """Add one group's gradients to the sums of the rows that the cells read.

    Args:
        cells_BW: The place of each cell's row.
        gradient: Flat. The gradients of cell (b, w) begin at ``b * strides[0] + w * strides[1]``.
        strides: See there; 0 where instances or columns share a gradient.
        start: The group's first column in ``sums_US``.
        length: C.
    """
    sums, num_sums, num_columns = sums_US.reshape(-1), sums_US.shape[1], cells_BW.shape[1]
    cells = cells_BW.reshape(-1)
    n = 0
    for b in range(cells_BW.shape[0]):
        for w in range(num_columns):
            if n + _AHEAD < len(cells):
                _fetch(sums, _U(cells[n + _AHEAD] * num_sums + start), length)
            at = b * strides[0] + w * strides[1]
            _add(gradient, _U(at), sums, _U(cells[n] * num_sums + start), length)
            n += 1


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def scale_and_square(sums: F32, scale: np.float32) -> np.float32:  # pragma: no cover - compiled
    """Multiply all sums; returns the sum of their squares, which only has to be finite if they are."""
    square = np.float32(0)
    for n in range(len(sums)):
        scaled = sums[n] * scale
        sums[n] = scaled
        square += scaled * scaled
    return square


@njit(cache=True, nogil=True, error_model="numpy")
def adagrad(
    flat: F32, width: int, rows_U: I64, sums_US: F32, columns: Columns, keep_U: F32, rate_U: F32
) -> None:  # pragma: no cover - compiled
    """One step of Adagrad on some rows.

    Args:
        flat: The records, float32 [R·X].
        width: X.
        rows_U: The rows.
        sums_US: Their gradients.
        columns: The groups.
        keep_U: What the accumulators keep of what they have above their first value; empty: all of it.
        rate_U: Factors on the learning rates; empty: 1.
    """
    sums, num_sums = sums_US.reshape(-1), sums_US.shape[1]
    for u in range(len(rows_U)):
        if u + _AHEAD < len(rows_U):
            _fetch(flat, _U(rows_U[u + _AHEAD] * width), width)
        record, gradient = rows_U[u] * width, u * num_sums
        if len(keep_U):
            _forget(flat, record, columns, keep_U[u])
        for g in range(len(columns.weight_G)):
            rate = columns.rate_G[g] * rate_U[u] if len(rate_U) else columns.rate_G[g]
            weight, at = _U(record + columns.weight_G[g]), _U(gradient + columns.weight_G[g])
            accumulator = _U(record + columns.accumulator_G[g])
            if columns.row_wise_G[g]:
                _step_of_row(flat, weight, accumulator, sums, at, columns.columns_G[g], rate)
            else:
                _step_of_each(flat, weight, accumulator, sums, at, columns.columns_G[g], rate)


@njit(cache=True, inline="always", error_model="numpy")
def _step_of_row(
    flat: F32, weight: np.uint64, accumulator: np.uint64, sums: F32, at: np.uint64, length: int, rate: np.float32
) -> None:  # pragma: no cover - compiled
    whole = length - length % LANES
    square = np.float32(0)
    for b in range(0, whole, LANES):
        square += square8(sums, at + _U(b))
    for c in range(whole, length):
        square += sums[at + _U(c)] * sums[at + _U(c)]
    total = flat[accumulator] + square / np.float32(length)
    flat[accumulator] = total
    factor = rate / (np.sqrt(total) + np.float32(1e-10))
    for b in range(0, whole, LANES):
        subtract8(sums, at + _U(b), factor, flat, weight + _U(b))
    for c in range(whole, length):
        flat[weight + _U(c)] -= factor * sums[at + _U(c)]


@njit(cache=True, inline="always", error_model="numpy")
def _step_of_each(
    flat: F32, weight: np.uint64, accumulator: np.uint64, sums: F32, at: np.uint64, length: int, rate: np.float32
) -> None:  # pragma: no cover - compiled
    whole = length - length % LANES
    for b in range(0, whole, LANES):
        adagrad8(sums, at + _U(b), rate, flat, accumulator + _U(b), weight + _U(b))
    for n in range(whole, length):
        c = _U(n)
        total = flat[accumulator + c] + sums[at + c] * sums[at + c]
        flat[accumulator + c] = total
        flat[weight + c] -= rate * sums[at + c] / (np.sqrt(total) + np.float32(1e-10))


@njit(cache=True)
def _forget(flat: F32, record: int, columns: Columns, keep: np.float32) -> None:  # pragma: no cover - compiled
    for g in range(len(columns.weight_G)):
        first = columns.first_G[g]
        for a in range(1 if columns.row_wise_G[g] else columns.columns_G[g]):
            at = record + columns.accumulator_G[g] + a
            flat[at] = first + (flat[at] - first) * keep


@njit(cache=True, nogil=True)
def mark(bits: U64, rows_N: I64) -> None:  # pragma: no cover - compiled
    """Set the bits of some rows."""
    for row in rows_N:
        bits[row >> 6] |= _U(1) << _U(row & 63)


@njit(cache=True, nogil=True)
def take_marked(bits: U64) -> I64:  # pragma: no cover - compiled
    """The rows whose bits are set, in the order of their numbers; the bits are cleared."""
    count = 0
    for word in bits:
        while word:
            word &= word - _U(1)
            count += 1
    rows = np.empty(count, np.int64)
    n = 0
    for i in range(len(bits)):
        word = bits[i]
        if word:
            for bit in range(64):
                if (word >> _U(bit)) & _U(1):
                    rows[n] = i * 64 + bit
                    n += 1
            bits[i] = _U(0)
    return rows


@njit(cache=True, nogil=True)
def save_records(
    flat: F32, width: int, rows_N: I64, place_R: I32, log_rows: I64, log: F32, length: int
) -> int:  # pragma: no cover - compiled
    """Keep the records of those rows that have none in the log yet; returns the log's new length.

    Args:
        flat: The records, float32 [R·X].
        width: X.
        rows_N: The rows.
        place_R: 0 for a row that did not change since the view was opened; else 1 + its place in the log.
        log_rows, log: The log: rows, and flat records.
        length: Of the log.
    """
    for n in range(len(rows_N)):
        if n + _AHEAD < len(rows_N):
            prefetch(place_R, _U(rows_N[n + _AHEAD]))
            _fetch(flat, _U(rows_N[n + _AHEAD] * width), width)
        row = rows_N[n]
        if row < len(place_R) and place_R[row] == 0:
            log_rows[length] = row
            _copy(flat, _U(row * width), log, _U(length * width), width)
            length += 1
            place_R[row] = length
    return length


@njit(cache=True, nogil=True)
def read_as_of(
    flat: F32, width: int, log: F32, place_R: I32, rows_N: I64, columns: Columns, outs: tuple[F32, ...]
) -> None:  # pragma: no cover - compiled
    """As :func:`read_rows`, but what the rows were when the view was opened; the log is that of save_records."""
    num_weights = columns.weight_G[-1] + columns.columns_G[-1]
    for n in range(len(rows_N)):
        if n + _AHEAD < len(rows_N):
            prefetch(place_R, _U(rows_N[n + _AHEAD]))
            _fetch(flat, _U(rows_N[n + _AHEAD] * width), num_weights)
        row = rows_N[n]
        place = np.int64(place_R[row])
        source, record = (log, (place - 1) * width) if place else (flat, row * width)
        for g in range(len(outs)):
            length = columns.columns_G[g]
            _copy(source, _U(record + columns.weight_G[g]), outs[g], _U(n * length), length)


@njit(cache=True, nogil=True)
def records_as_of(
    flat: F32, width: int, log: F32, place_R: I32, start: int, out: F32
) -> None:  # pragma: no cover - compiled
    """Copy whole records from row ``start`` on, as they were when the view was opened."""
    for n in range(len(out) // width):
        place = np.int64(place_R[start + n])
        source, record = (log, (place - 1) * width) if place else (flat, (start + n) * width)
        _copy(source, _U(record), out, _U(n * width), width)


def compile_kernels(num_groups: int) -> None:
    """Run every loop once, on no rows, for a table of so many groups of columns."""
    flat, rows, bits = np.zeros(1, np.float32), np.zeros(0, np.int64), np.zeros(0, np.uint64)
    places, wide, several = np.zeros(0, np.int32), np.zeros((0, 1), np.float32), (flat,) * num_groups
    none = np.zeros(num_groups, np.int64)
    rates = none.astype(np.float32)
    columns = Columns(none, none, none, none.astype(np.bool_), rates, rates)
    read_cells(flat, 1, rows, rows, columns, several)
    read_rows(flat, 1, rows, columns, several)
    read_rows(flat, 1, rows, columns, several[:1])  # all groups side by side, for other ranks
    write_rows(flat, 1, rows, columns, several)
    add_gradients(np.zeros((0, 1), np.int64), flat, (0, 0), 0, 1, wide)
    scale_and_square(flat, np.float32(1))
    adagrad(flat, 1, rows, wide, columns, flat[:0], flat[:0])
    mark(bits, rows)
    take_marked(bits)
    save_records(flat, 1, rows, places, rows, flat, 0)
    read_as_of(flat, 1, flat, places, rows, columns, several)
    records_as_of(flat, 1, flat, places, 0, flat[:0])
