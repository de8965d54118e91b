"""Make a text file ready for DuckDB: unpacked, in UTF-8, with LF at every row's end and nothing but rows.

A file that is so already is read where it lies; of any other, what is to be read is written into the log's temporary
folder. :mod:`csv_lines` says what a row is.
"""

import codecs
import csv as csv_module
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from simulators.logs import csv_lines
from simulators.logs.csv_lines import Bytes, Scan
from smes.errors import LogError
from smes_io.log_spec import CsvFormat

_PIECE_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class CsvFile:
    """A text file and how DuckDB reads it.

    Attributes:
        path: The file as the user knows it.
        read: What DuckDB reads.
        text: The unpacked file in UTF-8, in which lines are numbered.
        skip: Lines before the first row in ``read``.
        names: The columns.
        first: Where the first row begins in ``text``, in bytes.
        first_line: The number of its line.
        scan: What the file holds.
    """

    path: str
    read: str
    text: str
    skip: int
    names: tuple[str, ...]
    first: int
    first_line: int
    scan: Scan


def delimiter_of(path: str, csv: CsvFormat) -> str:
    """What separates the fields of a file."""
    if csv.delimiter is not None:
        return csv.delimiter
    return "\t" if ".tsv" in [suffix.lower() for suffix in Path(path).suffixes[-2:]] else ","


def prepare(path: str, csv: CsvFormat, folder: Path) -> CsvFile:
    """Find a file's columns and rows.

    Args:
        path: The file.
        csv: How it is written.
        folder: Where its cleaned copy goes if it needs one.

    Raises:
        LogError: It cannot be unpacked or decoded, is empty, or its header is none.
    """
    text = _unpacked(path, csv, folder)
    data = _mapped(path, text)
    delimiter = delimiter_of(path, csv)
    start = len(_BOM) if data[: len(_BOM)].tobytes() == _BOM else 0
    head = [*csv_lines.lines(data, start, csv.skip_lines + (not csv.names))]
    names = csv.names or _header(path, [line for line, _ in head], csv, delimiter)
    first = head[-1][1] if head else start
    scan = csv_lines.scan(data, first, len(head) + 1, len(names), csv, delimiter, None)
    read, skip = text, len(head)
    if not scan.clean or csv.skip_lines or csv.names:
        read, skip = _fresh(folder), 0
        with Path(read).open("wb") as out:
            csv_lines.scan(data, first, len(head) + 1, len(names), csv, delimiter, out)
    return CsvFile(path, read, text, skip, tuple(names), first, len(head) + 1, scan)


def line_of_row(file: CsvFile, row: int, csv: CsvFormat) -> int:
    """The number of the line at which a file's row begins; its first row is number 0."""
    data, delimiter = _mapped(file.path, file.text), delimiter_of(file.path, csv)
    return csv_lines.line_of_row(data, file.first, file.first_line, len(file.names), csv, delimiter, row)


def _header(path: str, head: list[bytes], csv: CsvFormat, delimiter: str) -> list[str]:
    line = csv.skip_lines + 1
    if len(head) < line:
        raise LogError(f"{path}: {len(head)} lines, expected the names of the columns in line {line}")
    if head[-1].startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise LogError(f"{path}: it begins like UTF-16, expected {csv.encoding} (log.csv.encoding)")
    try:
        text = head[-1].decode()
    except UnicodeDecodeError as error:
        raise LogError(
            f"{path}:{line}: a header that is no {csv.encoding}, expected log.csv.encoding to fit"
        ) from error
    names = fields_of(text, csv, delimiter)
    folded = [name.casefold() for name in names]
    if twice := [name for name in names if name and folded.count(name.casefold()) > 1]:
        raise LogError(
            f"{path}:{line}: columns {', '.join(twice)}, expected a header of names that differ in more than upper and "
            f"lower case (log.csv.names gives others, or those of a file without a header; log.csv.skip_lines: {line} "
            "passes over a header)"
        )
    return [name or f"column{i}" for i, name in enumerate(names)]


def fields_of(text: str, csv: CsvFormat, delimiter: str) -> list[str]:
    """The fields of one line, which no quote goes beyond."""
    if len(delimiter) > 1 or not csv.quote:
        return text.split(delimiter)
    doubled = csv.escape in ("", csv.quote)
    escape = None if doubled else csv.escape
    return next(
        csv_module.reader([text], delimiter=delimiter, quotechar=csv.quote, doublequote=doubled, escapechar=escape), []
    )


def _mapped(path: str, text: str) -> Bytes:
    if Path(text).stat().st_size == 0:
        raise LogError(f"{path}: an empty file, expected rows")
    return np.memmap(text, np.uint8, "r")


def _unpacked(path: str, csv: CsvFormat, folder: Path) -> str:
    packed = Path(path).suffix.lower() in (".gz", ".zst")
    utf8 = codecs.lookup(csv.encoding).name in ("utf-8", "utf-8-sig", "ascii")
    if not packed and utf8:
        return path
    text = _fresh(folder)
    try:
        with Path(text).open("wb") as out:
            _decode(path, None if utf8 else csv.encoding, out)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise LogError(f"{path}: {error}, expected a file that can be unpacked") from error
    except UnicodeError as error:
        raise LogError(f"{path}: {error}, expected text in {csv.encoding} (log.csv.encoding)") from error
    return text


def _decode(path: str, encoding: str | None, out: BinaryIO) -> None:
    """Write a file as UTF-8. What is no text of its encoding becomes bytes that are no UTF-8, found line by line."""
    if encoding is None:
        for piece in pieces(path):
            out.write(piece)
        return
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    for piece in pieces(path):
        out.write(decoder.decode(piece).encode("utf-8", "surrogatepass"))
    out.write(decoder.decode(b"", final=True).encode("utf-8", "surrogatepass"))


def pieces(path: str) -> Iterator[bytes]:
    """The bytes of a file, unpacked."""
    suffix = Path(path).suffix.lower()
    if suffix == ".zst":
        with pa.input_stream(path, compression="zstd") as stream:
            while piece := stream.read(_PIECE_BYTES):
                yield piece
        return
    with gzip.open(path, "rb") if suffix == ".gz" else Path(path).open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _fresh(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return str(folder / f"{len(list(folder.iterdir()))}.csv")
