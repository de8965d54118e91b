"""The compiled loops of :mod:`smes_scorer.answer_writer`: items and their scores as JSON, numbers as short decimals.

A float32 takes nine decimal digits at most. What is written here reads back, by way of a double, as the float32 that it
was; fewer digits are written where fewer do.

Letters: N items of a request, K items of its answer, T tasks, C tasks of the answer.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import F32, F64, I64

U8 = NDArray[np.uint8]

NOT_FINITE = -1
"""Instead of a length: a number is NaN or infinite."""

NUMBER_BYTES = 20
"""As many as any number takes, or more."""

FRAME_BYTES = 32
"""As many as surround an item, and as stand before the ranking, or more."""

_DIGITS = 9
_POWERS: F64 = np.array([float(f"1e{exponent}") for exponent in range(64)])
_LEAST, _MOST = 10 ** (_DIGITS - 1), 10**_DIGITS
_PAIRS = np.frombuffer("".join(f"{pair:02}" for pair in range(100)).encode(), np.uint8)
_FIXED_FROM, _FIXED_TO = -5, 9
"""Decimal exponents of the numbers that are written without one."""

_QUOTE, _BACKSLASH, _COMMA, _CLOSING = (np.uint8(ord(character)) for character in '"\\,}')
_ZERO, _POINT, _MINUS, _E = (np.uint8(ord(character)) for character in "0.-e")
_ITEM = np.frombuffer(b'{"item_id":', np.uint8)
_RANKING = np.frombuffer(b'],"ranking":[', np.uint8)


@njit(cache=True, nogil=True)
def write_items(
    listed: U8,
    items_K: I64,
    ranking_K: I64,
    columns_C: I64,
    scores_NT: F32,
    fused_N: F32,
    pieces: U8,
    ends: I64,
    out: U8,
) -> int:  # pragma: no cover - compiled
    """Write the items of an answer, ``],"ranking":[``, and the ids of its ranking.

    Args:
        listed: uint8, the N items of the request as a JSON array without spaces.
        items_K: int64, which of them to write with their scores, in this order.
        ranking_K: int64, the order of the ranking.
        columns_C: int64, the tasks whose scores to write.
        scores_NT, fused_N: float32, the scores and the fused scores.
        pieces: uint8, what stands before each score of an item, and before its fused score.
        ends: int64 [C + 1], where each of these ends.
        out: uint8, with room for everything.

    Returns:
        How many bytes were written; :data:`NOT_FINITE` where a score is NaN or infinite.
    """
    n = len(fused_N)
    for i in range(n):
        if not np.isfinite(fused_N[i]):
            return NOT_FINITE
        for t in range(scores_NT.shape[1]):
            if not np.isfinite(scores_NT[i, t]):
                return NOT_FINITE
    starts = _starts(listed, n)
    at: int = 0
    for k in range(len(items_K)):
        i = items_K[k]
        if k:
            out[at] = _COMMA
            at += 1
        at = _copy(_ITEM, 0, len(_ITEM), out, at)
        at = _copy(listed, starts[i], starts[i + 1] - 1, out, at)
        begin = 0
        for c in range(len(columns_C)):
            at = _copy(pieces, begin, ends[c], out, at)
            begin = ends[c]
            at = write_number(scores_NT[i, columns_C[c]], out, at)
        at = _copy(pieces, begin, ends[-1], out, at)
        at = write_number(fused_N[i], out, at)
        out[at] = _CLOSING
        at += 1
    at = _copy(_RANKING, 0, len(_RANKING), out, at)
    for k in range(len(ranking_K)):
        i = ranking_K[k]
        if k:
            out[at] = _COMMA
            at += 1
        at = _copy(listed, starts[i], starts[i + 1] - 1, out, at)
    return at


@njit(cache=True, nogil=True)
def write_number(value: np.float32, out: U8, at: int) -> int:  # pragma: no cover - compiled
    """Write a finite number at a place; the place after it."""
    if math.copysign(1.0, value) < 0:
        out[at] = _MINUS
        at += 1
        value = -value
    if value == 0:
        out[at], out[at + 1], out[at + 2] = _ZERO, _POINT, _ZERO
        return at + 3
    whole, exponent = _decimal(value)
    if exponent < 0 and exponent >= _FIXED_FROM:
        out[at], out[at + 1] = _ZERO, _POINT
        at += 2
        for _ in range(-exponent - 1):
            out[at] = _ZERO
            at += 1
        _write_digits(whole, out, at)
        at += _DIGITS
        while out[at - 1] == _ZERO:
            at -= 1
        return at
    before = exponent + 1 if exponent >= 0 and exponent < _FIXED_TO else 1
    _write_digits(whole, out, at + 1)
    for i in range(before):
        out[at + i] = out[at + i + 1]
    out[at + before] = _POINT
    least = at + before + 2
    at += _DIGITS + 1
    if at < least:
        out[at] = _ZERO
        at += 1
    while at > least and out[at - 1] == _ZERO:
        at -= 1
    if exponent >= 0 and exponent < _FIXED_TO:
        return at
    out[at] = _E
    at += 1
    if exponent < 0:
        out[at] = _MINUS
        at += 1
    power = abs(exponent)
    out[at], out[at + 1] = _ZERO + np.uint8(power // 10), _ZERO + np.uint8(power % 10)
    return at + 2


@njit(cache=True, nogil=True)
def _decimal(value: np.float32) -> tuple[np.int64, int]:  # pragma: no cover - compiled
    """Nine digits, as a whole number, and the exponent of the first, of a positive number; zeros where fewer do."""
    number = float(value)
    if number >= 1e-3 and number < 1.0:  # most are probabilities
        exponent = -1 if number >= 0.1 else -2 if number >= 0.01 else -3
    else:
        exponent = math.floor(math.log10(number))
    whole = np.int64(np.rint(_scaled(number, _DIGITS - 1 - exponent)))
    if whole < _LEAST:  # the logarithm was a hair too large
        exponent -= 1
        whole = np.int64(np.rint(_scaled(number, _DIGITS - 1 - exponent)))
    shift = exponent - (_DIGITS - 1)
    best = whole
    fewer = (whole + 5) // 10 * 10
    if np.float32(_scaled(float(fewer), shift)) == value:
        best = fewer
        fewer = (whole + 50) // 100 * 100
        if np.float32(_scaled(float(fewer), shift)) == value:
            best = fewer
    if best >= _MOST:  # rounded up to a power of ten
        return best // 10, exponent + 1
    return best, exponent


@njit(cache=True, inline="always")
def _scaled(number: float, shift: int) -> np.float64:  # pragma: no cover - compiled
    """Times ten to the power of ``shift``, -63 … 63."""
    scaled: np.float64 = number * _POWERS[shift] if shift >= 0 else number / _POWERS[-shift]
    return scaled


@njit(cache=True, nogil=True)
def _write_digits(whole: np.int64, out: U8, at: int) -> None:  # pragma: no cover - compiled
    """Write nine digits."""
    rest = np.uint32(whole)
    first, last = rest // np.uint32(10000), rest % np.uint32(10000)
    out[at] = _ZERO + np.uint8(first // np.uint32(10000))
    _write_four(first % np.uint32(10000), out, at + 1)
    _write_four(last, out, at + 5)


@njit(cache=True, inline="always")
def _write_four(number: np.uint32, out: U8, at: int) -> None:  # pragma: no cover - compiled
    high, low = np.uint32(2) * (number // np.uint32(100)), np.uint32(2) * (number % np.uint32(100))
    out[at], out[at + 1] = _PAIRS[high], _PAIRS[high + np.uint32(1)]
    out[at + 2], out[at + 3] = _PAIRS[low], _PAIRS[low + np.uint32(1)]


@njit(cache=True, nogil=True)
def _starts(listed: U8, n: int) -> I64:  # pragma: no cover - compiled
    """Where each of the N values of a JSON array begins; int64 [N + 1], the last where one more would."""
    starts = np.empty(n + 1, np.int64)
    starts[0], found, at, quoted = 1, 1, 1, False
    while at < len(listed) - 1:
        byte = listed[at]
        if quoted:
            if byte == _BACKSLASH:
                at += 1
            elif byte == _QUOTE:
                quoted = False
        elif byte == _QUOTE:
            quoted = True
        elif byte == _COMMA:
            starts[found] = at + 1
            found += 1
        at += 1
    starts[n] = len(listed)
    return starts


@njit(cache=True, inline="always")
def _copy(source: U8, begin: int, end: int, out: U8, at: int) -> int:  # pragma: no cover - compiled
    """Copy some bytes to a place; the place after them."""
    for i in range(begin, end):
        out[at + i - begin] = source[i]
    return at + end - begin


def compile_answer_kernels() -> None:
    """Compile every loop, so that no answer waits for it."""
    listed, pieces = np.frombuffer(b"[1]", np.uint8), np.frombuffer(b"ab", np.uint8)
    places, scores = np.zeros(1, np.int64), np.zeros((1, 1), np.float32)
    out = np.empty(2 * FRAME_BYTES + 2 * NUMBER_BYTES + len(pieces) + 2 * len(listed), np.uint8)
    write_items(listed, places, places, places, scores, scores[0], pieces, np.array([1, 2]), out)
