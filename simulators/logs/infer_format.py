"""Find out how a text file is written: encoding, delimiter, quotes, header. A proposal for people, not for the reader.

The reader guesses nothing (:mod:`simulators.logs.csv_files`); this looks at the beginning of a file and proposes what a
schema file then declares.
"""

import codecs
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from simulators.logs import csv_lines
from simulators.logs.csv_files import fields_of, pieces
from smes_io.log_spec import CsvFormat

HEAD_BYTES = 1 << 20
_DELIMITERS = ("\t", ",", ";", "|", "::", "\x01", "^", " ")
_QUOTES = (('"', '"'), ('"', "\\"), ("'", "'"), ("", ""))
_LINES = 400
_NUMBER = re.compile(r"\s*[-+]?\d+(?:[.,]\d+)?(?:[eE][-+]?\d+)?\s*")
_BOMS = ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class TextLayout:
    """How a text file seems to be written.

    Attributes:
        csv: The same as the reader takes it, delimiter included. ``names`` is empty for a file with a header.
        columns: Its columns; None stands for each of a file without names.
        rows: The fields of its first rows.
        unsure: What is not certain, one sentence each.
    """

    csv: CsvFormat
    columns: tuple[str | None, ...]
    rows: tuple[tuple[str, ...], ...]
    unsure: tuple[str, ...] = ()


def text_layout(path: Path) -> TextLayout | None:
    """How a text file is written; None for one that is no table of at least two columns."""
    head = _head(path)
    if not head or (head[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and b"\x00" in head[:4096]):
        return None
    encoding = _encoding(path, head)
    text = head.decode(encoding, errors="replace").removeprefix("\ufeff")
    lines = re.split(r"\r\n|\n|\r", text)
    if len(head) >= HEAD_BYTES:
        lines.pop()  # the last one may be cut
    lines = lines[:_LINES]
    while lines and not lines[-1].strip():
        lines.pop()
    found = _split(lines)
    if found is None:
        return None
    delimiter, skip, fields = found
    lines = lines[skip:]
    quote, escape = _quotes("\n".join(line for line in lines if line), delimiter, fields)
    csv = CsvFormat(delimiter=delimiter, quote=quote, escape=escape, encoding=encoding, skip_lines=skip)
    rows = [row for line in lines if line and len(row := fields_of(line, csv, delimiter)) == fields]
    if not rows:
        return None
    header, why = _header(rows)
    unsure = [why] if why else []
    if skip:
        unsure.append(f"lines to pass over at the beginning: {skip}, which look like no rows")
    if encoding == "latin-1":
        unsure.append("bytes that are no UTF-8: it may be latin-1, cp1252 or another encoding of one byte a letter")
    if not header:
        return TextLayout(csv, (None,) * fields, tuple(map(tuple, rows)), tuple(unsure))
    columns = tuple(name or f"column{i}" for i, name in enumerate(rows[0]))
    folded = [name.casefold() for name in columns]
    if len(set(folded)) < len(folded):
        columns = unique_names(columns)
        csv = replace(csv, skip_lines=skip + 1, names=columns)
        unsure.append("its header names a column twice, so that the columns are named here")
    return TextLayout(csv, columns, tuple(map(tuple, rows[1:])), tuple(unsure))


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, made different in more than upper and lower case by a number behind those that come again."""
    seen: set[str] = set()
    found = []
    for name in names:
        other, count = name, 2
        while other.casefold() in seen:
            other, count = f"{name}_{count}", count + 1
        seen.add(other.casefold())
        found.append(other)
    return tuple(found)


def _head(path: Path) -> bytes:
    """The first bytes of a file, unpacked; none of one that cannot be."""
    try:
        head = b"".join(islice(pieces(str(path)), 1))
    except (OSError, EOFError, ValueError):
        return b""
    return head[:HEAD_BYTES]


def _encoding(path: Path, head: bytes) -> str:
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in islice(pieces(str(path)), 64):  # the first letter that is no ASCII may come late
            decoder.decode(piece)
    except UnicodeDecodeError as error:
        return "cp1252" if 0x80 <= error.object[error.start] < 0xA0 else "latin-1"
    except (OSError, EOFError, ValueError):
        pass
    return "utf-8"


def _split(lines: Sequence[str]) -> tuple[str, int, int] | None:
    """Delimiter, lines before the first row, and fields of a row; None where no delimiter splits lines alike."""
    best: tuple[tuple[float, bool, int, int], tuple[str, int, int]] | None = None
    places = [i for i, line in enumerate(lines) if line]
    whole = [lines[i] for i in places]
    for rank, delimiter in enumerate(_DELIMITERS):
        counts = [len(fields_of(line, CsvFormat(), delimiter)) for line in whole]
        fields, alike = Counter(counts).most_common(1)[0] if counts else (1, 0)
        if fields < 2 or alike < 0.9 * max(len(counts) - 5, 1):
            continue
        skip = next(i for i, count in enumerate(counts) if count == fields)
        if skip > 20 or (delimiter == " " and best is not None):
            continue
        if delimiter == " " and (len(whole) < 3 or any(line != line.strip() or "  " in line for line in whole)):
            continue
        score = (round(alike / len(counts) - _foreign(whole[skip:], delimiter) / 2, 2), delimiter != " ", fields, -rank)
        if best is None or score > best[0]:
            best = score, (delimiter, places[skip], fields)
    return None if best is None else best[1]


def _foreign(lines: Sequence[str], delimiter: str) -> float:
    """The share of fields in which another delimiter stands, as in ``1;2`` and ``5;3`` of the line ``1;2,5;3,7``."""
    fields = [field for line in lines[:50] for field in fields_of(line, CsvFormat(), delimiter)]
    others = [other for other in _DELIMITERS[:5] if other not in delimiter]
    return sum(any(o in f for o in others) and not _NUMBER.fullmatch(f) for f in fields) / max(len(fields), 1)


def _quotes(text: str, delimiter: str, fields: int) -> tuple[str, str]:
    """Quote and escape with which the fewest lines are no rows."""
    data = np.frombuffer(text.encode(), np.uint8)
    bad = []
    for quote, escape in _QUOTES:
        csv = CsvFormat(delimiter=delimiter, quote=quote, escape=escape)
        scan = csv_lines.scan(data, 0, 1, fields, csv, delimiter, None)
        bad.append(sum(scan.bad_lines.values()))
    if bad[0] == 0 and "'" in text:
        quoted = re.findall(rf"(?:^|{re.escape(delimiter)})'[^'\n]*'(?={re.escape(delimiter)}|$)", text, re.M)
        if len(quoted) > len(text.splitlines()) / 2:
            return _QUOTES[2]
    return _QUOTES[bad.index(min(bad))]


def _header(rows: Sequence[Sequence[str]]) -> tuple[bool, str]:
    """Whether the first row names the columns, and what to say if that is not certain."""
    first, rest = rows[0], rows[1:]
    if any(_NUMBER.fullmatch(name) for name in first):
        return False, ""
    if not rest:
        return True, "one line only: it is taken as the header"
    for i, name in enumerate(first):
        numbers = sum(bool(_NUMBER.fullmatch(row[i])) for row in rest)
        if name and numbers > 0.5 * len(rest):
            return True, ""
    again = any(row[i] == name for i, name in enumerate(first) if name for row in rest)
    words = all(re.fullmatch(r"[A-Za-z_][\w .:/()-]{0,60}", name) for name in first if name)
    is_header = words and not again and len(set(first)) == len(first)
    return is_header, f"no column of numbers tells: the first line is taken as {'the header' if is_header else 'a row'}"
