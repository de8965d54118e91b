"""Split text files into rows by one fixed rule, and tell every line that is none.

The rule is RFC 4180's with what its readers agree on: a field that begins with the quote ends with the next single one,
which a delimiter, a line end or the file's end must follow; a quote elsewhere is an ordinary character. A row has as
many fields as the file has columns, and is UTF-8. Where quotes do not fit, only the row's first line is lost: the next
line begins a new row, so one stray quote cannot swallow the rows behind it. Every lost line is counted.

One compiled pass over the mapped bytes finds the lines that are no rows. Letters: K bad lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import I64
from smes_io.log_spec import CsvFormat

MAX_ROW_BYTES = 1_900_000
"""DuckDB's own bound on a line is 2,000,000 bytes."""

BLANK, FIELDS, QUOTES, UNCLOSED, TOO_LONG, ENCODING = range(1, 7)
_PIECE = 1 << 16  # bad lines a call of the compiled scan
_BUFFER = 8 << 20  # bytes a call writes; more than MAX_ROW_BYTES

Bytes = NDArray[np.uint8]
Marks = tuple[Bytes, int, int]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no row of its file.

    Attributes:
        line: Its number, from 1.
        kind: What is wrong with it: a key of :attr:`Scan.bad_lines`.
        text: Its beginning.
    """

    line: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What a file holds.

    Attributes:
        rows: Rows of the right number of fields.
        bad: The first bad line of each kind.
        bad_lines: Reason → number of lines that are no rows.
        clean: Whether the file holds rows and empty lines only, all of which end with LF.
    """

    rows: int
    bad: tuple[BadLine, ...]
    bad_lines: dict[str, int]
    clean: bool


def scan(data: Bytes, start: int, line: int, fields: int, csv: CsvFormat, delimiter: str, out: BinaryIO | None) -> Scan:
    """Go through all rows.

    Args:
        data: The file.
        start: Where the first row begins.
        line: The number of its line.
        fields: Number of fields of a row.
        csv: How the file is written.
        delimiter: What separates its fields.
        out: Where the rows are written, each ended by LF; None: nowhere.
    """
    marks = _marks(csv, delimiter)
    buffer = np.empty(0 if out is None else _BUFFER, np.uint8)
    bad_K5 = np.empty((_PIECE, 5), np.int64)
    rows, clean, counts, first = 0, True, dict[str, int](), dict[str, BadLine]()
    while start < len(data):
        start, line, more, bad, written, returns = _scan(data, start, line, fields, *marks, -1, bad_K5, buffer)
        rows += more
        clean &= not returns
        if out is not None:
            out.write(buffer[:written].tobytes())
        for begin, end, at, reason, spanned in bad_K5[:bad].tolist() if bad else ():
            if reason == BLANK:
                continue
            clean = False
            kind = _kind(reason, fields, csv)
            counts[kind] = counts.get(kind, 0) + spanned
            if kind not in first:
                first[kind] = BadLine(at, kind, _text(data, begin, end))
    return Scan(rows, tuple(first.values()), counts, clean)


def line_of_row(data: Bytes, start: int, line: int, fields: int, csv: CsvFormat, delimiter: str, row: int) -> int:
    """The number of the line at which a row begins. The first row is number 0; bad lines are none."""
    marks = _marks(csv, delimiter)
    bad_K5, nowhere = np.empty((_PIECE, 5), np.int64), np.empty(0, np.uint8)
    rows = 0
    while start < len(data):
        begins, left = line, row - rows
        room_K5 = bad_K5 if left else bad_K5[:1]  # the wanted row, or the one line before it that is none
        start, line, more, *_ = _scan(data, start, line, fields, *marks, max(left, 1), room_K5, nowhere)
        if not left and more:
            return begins
        rows += more
    return line


def lines(data: Bytes, start: int, count: int) -> Iterator[tuple[bytes, int]]:
    """So many lines from a place on, without their ends, and where the next one begins; fewer at the file's end."""
    for _ in range(count):
        if start >= len(data):
            return
        end = int(_line_end(data, start))
        yield data[start:end].tobytes().rstrip(b"\r\n"), end
        start = end


def _marks(csv: CsvFormat, delimiter: str) -> tuple[Bytes, int, int]:
    quote = ord(csv.quote) if csv.quote else -1
    return np.frombuffer(delimiter.encode(), np.uint8), quote, ord(csv.escape) if csv.escape else quote


def _kind(reason: int, fields: int, csv: CsvFormat) -> str:
    quote = csv.quote
    return {
        FIELDS: f"wrong number of fields, expected {fields}",
        QUOTES: f"text behind a closing {quote}, expected a delimiter or the line's end",
        UNCLOSED: f"an opening {quote} that is not closed",
        TOO_LONG: f"more than {MAX_ROW_BYTES:,} bytes",
        ENCODING: f"bytes that are no text in {csv.encoding}",
    }[reason]


def _text(data: Bytes, begin: int, end: int) -> str:
    return data[begin : min(end, begin + 200)].tobytes().decode(errors="replace").rstrip("\r\n")


@njit(cache=True, nogil=True)
def _line_end(data: Bytes, start: int) -> int:  # pragma: no cover - compiled
    """Where the next line begins."""
    for i in range(start, len(data)):
        if data[i] == 10:
            return i + 1
        if data[i] == 13:
            return i + 2 if i + 1 < len(data) and data[i + 1] == 10 else i + 1
    return len(data)


@njit(cache=True, nogil=True)
def _is_utf8(data: Bytes, start: int, end: int) -> bool:  # pragma: no cover - compiled
    """Whether bytes are well-formed UTF-8 (The Unicode Standard, table 3-7)."""
    i = start
    while i < end:
        c = data[i]
        low, high = 0x80, 0xBF
        if c < 0x80:
            more = 0
        elif 0xC2 <= c <= 0xDF:
            more = 1
        elif 0xE0 <= c <= 0xEF:
            more = 2
            if c == 0xE0:
                low = 0xA0
            elif c == 0xED:
                high = 0x9F
        elif 0xF0 <= c <= 0xF4:
            more = 3
            if c == 0xF0:
                low = 0x90
            elif c == 0xF4:
                high = 0x8F
        else:
            return False
        if i + more >= end:
            return False
        for k in range(1, more + 1):
            if not low <= data[i + k] <= high:
                return False
            low, high = 0x80, 0xBF
        i += more + 1
    return True


@njit(cache=True, nogil=True)
def _delimited(data: Bytes, i: int, delimiter: Bytes) -> bool:  # pragma: no cover - compiled
    """Whether the delimiter stands here."""
    if data[i] != delimiter[0] or i + len(delimiter) > len(data):
        return False
    for k in range(1, len(delimiter)):  # noqa: SIM110 - compiled
        if data[i + k] != delimiter[k]:
            return False
    return True


@njit(cache=True, nogil=True)
def _closing(data: Bytes, i: int, stop: int, quote: int, escape: int) -> tuple[int, int]:  # pragma: no cover - compiled
    """Behind the quote that closes a field that begins at ``i``, or -1; and the line ends in between."""
    ends = 0
    while i < stop:
        c = data[i]
        if c == escape and escape != quote and i + 1 < stop:
            i += 2
            continue
        if c == quote:
            if escape == quote and i + 1 < stop and data[i + 1] == quote:
                i += 2
                continue
            return i + 1, ends
        if c == 10 or (c == 13 and not (i + 1 < stop and data[i + 1] == 10)):
            ends += 1
        i += 1
    return -1, ends


@njit(cache=True, nogil=True)
def _row(
    data: Bytes, start: int, delimiter: Bytes, quote: int, escape: int
) -> tuple[int, int, int, int]:  # pragma: no cover - compiled
    """One row from its beginning: its end without the line's end, fields, line ends inside, and what is wrong."""
    i, fields, ends, begins = start, 1, 0, True
    stop = min(len(data), start + MAX_ROW_BYTES + 1)
    while i < stop:
        c = data[i]
        if begins and c == quote:
            i, inside = _closing(data, i + 1, stop, quote, escape)
            if i < 0:
                return stop, fields, ends, UNCLOSED
            ends += inside
            if i < len(data) and data[i] != 10 and data[i] != 13 and not _delimited(data, i, delimiter):
                return i, fields, ends, QUOTES
            begins = False
            continue
        begins = False
        if c == 10 or c == 13:
            return i, fields, ends, 0
        if _delimited(data, i, delimiter):
            fields += 1
            i += len(delimiter)
            begins = True
            continue
        i += 1
    return i, fields, ends, TOO_LONG if stop < len(data) else 0


@njit(cache=True, nogil=True)
def _fault(data: Bytes, start: int, end: int, found: int, fields: int) -> int:  # pragma: no cover - compiled
    """What is wrong with a row whose quotes fit; 0 for nothing."""
    if end == start:
        return BLANK
    if found != fields:
        return FIELDS
    return 0 if _is_utf8(data, start, end) else ENCODING


@njit(cache=True, nogil=True)
def _scan(
    data: Bytes,
    start: int,
    line: int,
    fields: int,
    delimiter: Bytes,
    quote: int,
    escape: int,
    most_rows: int,
    bad_K5: I64,
    out: Bytes,
) -> tuple[int, int, int, int, int, bool]:  # pragma: no cover - compiled
    """Go through rows until one of the buffers is full, ``most_rows`` are found (-1: all) or the data ends.

    Returns:
        Where the next row begins, its line, rows, bad lines (begin, end, line, reason, lines), bytes written, and
        whether a row ended with CR.
    """
    rows, bad, written, returns = 0, 0, 0, False
    while start < len(data) and bad < len(bad_K5) and rows != most_rows:
        end, found, ends, reason = _row(data, start, delimiter, quote, escape)
        if len(out) > 0 and written + end - start + 1 > len(out):
            break
        if reason:
            after, ends = _line_end(data, start), 0
        else:
            after, reason = _line_end(data, end), _fault(data, start, end, found, fields)
            returns |= end < len(data) and data[end] == 13
        if reason:
            bad_K5[bad] = start, after, line, reason, 1 + ends
            bad += 1
        else:
            rows += 1
            if len(out) > 0:
                out[written : written + end - start] = data[start:end]
                out[written + end - start] = 10
                written += end - start + 1
        line += 1 + ends
        start = after
    return start, line, rows, bad, written, returns
