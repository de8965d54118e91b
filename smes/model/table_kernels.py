"""The compiled loops of the table in the host's memory. Each passes once over the rows that it touches.

Letters: R rows of the table, X floats of a record, U distinct rows of a batch, N cells, C columns of a group, S columns
of all groups, L records in an undo log.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import F32, I32, I64

U8 = NDArray[np.uint8]


@njit(cache=True, nogil=True)
def gather_cells(
    records_RX: F32, rows_U: I64, cells_N: I64, start: int, out_NC: F32
) -> None:  # pragma: no cover - compiled
    """Copy the columns from ``start`` on of the record that each cell reads."""
    for n in range(len(cells_N)):
        row = rows_U[cells_N[n]]
        for c in range(out_NC.shape[1]):
            out_NC[n, c] = records_RX[row, start + c]


@njit(cache=True, nogil=True)
def gather_rows(records_RX: F32, rows_N: I64, start: int, out_NC: F32) -> None:  # pragma: no cover - compiled
    """Copy the columns from ``start`` on of some records."""
    for n in range(len(rows_N)):
        for c in range(out_NC.shape[1]):
            out_NC[n, c] = records_RX[rows_N[n], start + c]


@njit(cache=True, nogil=True)
def sum_gradients(
    order_N: I64, start_U: I64, cells_NC: F32, scale: np.float32, start: int, out_US: F32
) -> float:  # pragma: no cover - compiled
    """Sum one group's gradients of the cells that read each row; returns the sum of squares of the sums."""
    square = 0.0
    for u in range(len(start_U)):
        end = start_U[u + 1] if u + 1 < len(start_U) else len(order_N)
        for c in range(cells_NC.shape[1]):
            total = np.float32(0)
            for i in range(start_U[u], end):
                total += cells_NC[order_N[i], c]
            total *= scale
            out_US[u, start + c] = total
            square += np.float64(total) * np.float64(total)
    return square


@njit(cache=True, nogil=True)
def adagrad(
    records_RX: F32,
    rows_U: I64,
    gradient_US: F32,
    group: tuple[int, int, int, bool],
    rule: tuple[np.float32, np.float32],
    keep_U: F32,
    rate_U: F32,
) -> None:  # pragma: no cover - compiled
    """One step of Adagrad on one group's columns.

    Args:
        group: (first weight, number of weights, first accumulator, whether there is one accumulator a row).
        rule: (learning rate, first value of an accumulator).
        keep_U: What each accumulator keeps of what it has above its first value; empty: all of it.
        rate_U: Factors on the learning rate; empty: 1.
    """
    weight, columns, accumulator, row_wise = group
    learning_rate, first = rule
    for u in range(len(rows_U)):
        row = rows_U[u]
        rate = learning_rate * rate_U[u] if len(rate_U) else learning_rate
        if row_wise:
            square = np.float32(0)
            for c in range(columns):
                square += gradient_US[u, weight + c] * gradient_US[u, weight + c]
            total = records_RX[row, accumulator]
            if len(keep_U):
                total = first + (total - first) * keep_U[u]
            total += square / np.float32(columns)
            records_RX[row, accumulator] = total
            factor = rate / (np.sqrt(total) + np.float32(1e-10))
            for c in range(columns):
                records_RX[row, weight + c] -= factor * gradient_US[u, weight + c]
        else:
            for c in range(columns):
                gradient = gradient_US[u, weight + c]
                total = records_RX[row, accumulator + c]
                if len(keep_U):
                    total = first + (total - first) * keep_U[u]
                total += gradient * gradient
                records_RX[row, accumulator + c] = total
                records_RX[row, weight + c] -= rate * gradient / (np.sqrt(total) + np.float32(1e-10))


@njit(cache=True, nogil=True)
def mark(bits: U8, rows_N: I64, marked: I64, count: int) -> int:  # pragma: no cover - compiled
    """Append the rows that are not marked yet to ``marked``, and mark them; returns how many are marked now."""
    for row in rows_N:
        if not bits[row >> 3] & (1 << (row & 7)):
            bits[row >> 3] |= 1 << (row & 7)
            marked[count] = row
            count += 1
    return count


@njit(cache=True, nogil=True)
def unmark(bits: U8, rows_N: I64) -> None:  # pragma: no cover - compiled
    """Take the marks of some rows away."""
    for row in rows_N:
        bits[row >> 3] &= ~(1 << (row & 7))


@njit(cache=True, nogil=True)
def save_records(
    records_RX: F32, rows_N: I64, place_R: I32, log_rows: I64, log_LX: F32, length: int
) -> int:  # pragma: no cover - compiled
    """Keep the records of those rows that have none in the log yet; returns the log's new length.

    Args:
        place_R: 0 for a row that did not change since the view was opened; else 1 + its place in the log.
    """
    for row in rows_N:
        if row < len(place_R) and place_R[row] == 0:
            log_rows[length] = row
            log_LX[length] = records_RX[row]
            length += 1
            place_R[row] = length
    return length


@njit(cache=True, nogil=True)
def read_as_of(
    records_RX: F32, log_LX: F32, place_R: I32, rows_N: I64, start: int, out_NC: F32
) -> None:  # pragma: no cover - compiled
    """Copy the columns from ``start`` on of some records, as they were when the view was opened."""
    for n in range(len(rows_N)):
        row = rows_N[n]
        place = place_R[row]
        if place:
            for c in range(out_NC.shape[1]):
                out_NC[n, c] = log_LX[place - 1, start + c]
        else:
            for c in range(out_NC.shape[1]):
                out_NC[n, c] = records_RX[row, start + c]
