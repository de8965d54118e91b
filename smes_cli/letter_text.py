"""Dead letters as text: one line for a list, a page for one of them.

What is in a letter was written by others, and perhaps for whoever looks at it: a terminal gets no character of it that
it would obey, nor one that changes the direction of reading.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from smes_cli.times import utc

if TYPE_CHECKING:
    from stream.dead_letter_reading import StoredLetter

_MOST_LINES = 60
_OBEYED = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _OBEYED}


def escaped(text: str) -> str:
    """A text that others wrote, in one line, its control characters escaped."""
    return text.translate(_SHOWN)


def one_line(stored: "StoredLetter") -> str:
    """A letter in one line."""
    letter = stored.letter
    many = f" ({letter.events:,} events)" if letter.events != 1 else ""
    return escaped(f"{stored.id}  {utc(stored.written_ms)}  {stored.place}  {letter.code}{many}: {letter.reason}")


def letter_lines(stored: "StoredLetter", *, replayed: bool) -> Iterator[str]:
    """A letter as a page for people."""
    return map(escaped, _lines(stored, replayed=replayed))


def _lines(stored: "StoredLetter", *, replayed: bool) -> Iterator[str]:
    from stream.dead_letter_values import header_text, payload_lines

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
        yield "headers   " + ", ".join(f"{name} = {header_text(value)}" for name, value in letter.headers)
    part = "" if stored.is_whole else f", of which {len(letter.payload):,} are here"
    yield f"payload   {stored.payload_bytes:,} bytes{part}"
    lines = list(payload_lines(stored))
    yield from (f"    {line}" for line in lines[:_MOST_LINES])
    if len(lines) > _MOST_LINES:
        yield f"    … {len(lines) - _MOST_LINES:,} more lines: --json has all of it"
