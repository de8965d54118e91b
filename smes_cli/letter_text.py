"""Dead letters as text: one line for a list, a page for one of them."""

import base64
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from smes_cli.times import utc

if TYPE_CHECKING:
    from stream.dead_letter_reading import StoredLetter

_MOST_LINES = 60
_MOST_ROWS = 5


def one_line(stored: "StoredLetter") -> str:
    """A letter in one line."""
    letter = stored.letter
    many = f" ({letter.events:,} events)" if letter.events != 1 else ""
    return f"{stored.id}  {utc(stored.written_ms)}  {stored.place}  {letter.code}{many}: {letter.reason}"


def letter_values(stored: "StoredLetter") -> dict[str, Any]:
    """A letter as plain JSON values."""
    letter = stored.letter
    headers = None if letter.headers is None else {name: _text(value) for name, value in letter.headers}
    return {
        "id": stored.id,
        "log": stored.log,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "row": letter.row,
        "code": letter.code,
        "reason": letter.reason,
        "field": letter.field,
        "place": letter.place,
        "events": letter.events,
        "written_ms": stored.written_ms,
        "arrival_ms": letter.arrival_ms,
        "headers": headers,
        "payload": base64.b64encode(letter.payload).decode("ascii"),
        "payload_bytes": stored.payload_bytes,
        "is_whole": stored.is_whole,
    }


def letter_lines(stored: "StoredLetter", *, replayed: bool) -> Iterator[str]:
    """A letter as a page for people."""
    letter = stored.letter
    yield f"letter    {stored.id}, written {utc(stored.written_ms)} UTC" + (", replayed" if replayed else "")
    arrived = "" if letter.arrival_ms is None else f", arrived {utc(letter.arrival_ms)} UTC"
    yield f"event     {stored.place}{arrived}; log {stored.log or 'unknown'}"
    if letter.place is not None:
        yield f"place     {letter.place}"
    if letter.events != 1:
        yield f"stands    for {letter.events:,} events"
    yield f"reason    {letter.code}: {letter.reason}"
    if letter.field is not None:
        yield f"field     {letter.field}"
    if letter.headers:
        yield "headers   " + ", ".join(f"{name} = {_text(value)}" for name, value in letter.headers)
    part = "" if stored.is_whole else f", of which {len(letter.payload):,} are here"
    yield f"payload   {stored.payload_bytes:,} bytes{part}"
    lines = list(_payload_lines(stored))
    yield from (f"    {line}" for line in lines[:_MOST_LINES])
    if len(lines) > _MOST_LINES:
        yield f"    … {len(lines) - _MOST_LINES:,} more lines: --json has all of it"


def _payload_lines(stored: "StoredLetter") -> Iterator[str]:
    letter = stored.letter
    codec = dict(letter.headers or ()).get("codec", b"json")
    if codec == b"arrow" and letter.row is None:
        rows = _arrow_rows(letter.payload)
        if rows is not None:
            yield from rows
            return
    try:
        yield from json.dumps(json.loads(letter.payload), indent=2, ensure_ascii=False).splitlines()
    except (ValueError, RecursionError):
        yield from letter.payload.decode("utf-8", "backslashreplace").splitlines()


def _arrow_rows(payload: bytes) -> list[str] | None:
    """The columns of an Arrow record, and its first rows; None if it cannot be read."""
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(pa.py_buffer(payload)) as reader:
            table = reader.read_all()
        table.validate(full=True)
        first = table.slice(0, _MOST_ROWS).to_pylist()
    except (pa.ArrowException, ValueError, OSError):
        return None
    columns = ", ".join(f"{field.name} {field.type}" for field in table.schema)
    more = [f"… {table.num_rows - len(first):,} more rows"] if table.num_rows > len(first) else []
    return [f"Arrow, {table.num_rows:,} rows: {columns}", *(json.dumps(row, default=repr) for row in first), *more]


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
