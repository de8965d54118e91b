"""Dead letters and what came of a replay, as plain values and as lines of text."""

import base64
import json
from collections.abc import Iterator
from typing import Any

from stream.dead_letter_reading import StoredLetter
from stream.dead_letter_replay import ReplayOutcome

_MOST_ROWS = 5


def letter_values(stored: StoredLetter) -> dict[str, Any]:
    """A letter as plain JSON values."""
    letter = stored.letter
    headers = None if letter.headers is None else {name: header_text(value) for name, value in letter.headers}
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


def payload_lines(stored: StoredLetter) -> Iterator[str]:
    """The payload as people read it: JSON indented, of an Arrow record its columns and first rows, else the bytes."""
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


def header_text(value: bytes) -> str:
    """A header's value as text."""
    return value.decode("utf-8", "backslashreplace")


def outcome_values(outcome: ReplayOutcome, *, dry_run: bool) -> dict[str, Any]:
    """What came of a replay, as plain JSON values."""
    return {
        "dry_run": dry_run,
        "chosen": outcome.chosen,
        "appended": outcome.appended,
        "events": outcome.events,
        "too_late": outcome.too_late,
        "replayed_before": outcome.replayed_before,
        "found": outcome.found,
        "refused": dict(outcome.refused),
        "impossible": dict(outcome.impossible),
    }


def outcome_lines(outcome: ReplayOutcome, *, dry_run: bool, adopt_schema: str) -> Iterator[str]:
    """What came of a replay, in words.

    Args:
        outcome: What :meth:`stream.dead_letter_replay.Replayer.run` returned.
        dry_run: Whether it was one.
        adopt_schema: How its reader asks for ``adopt_schema``, such as ``--adopt-schema``.
    """
    would = "would be appended" if dry_run else "appended"
    yield f"{outcome.chosen:,} letters chosen: {outcome.appended:,} {would}, with {outcome.events:,} events"
    if outcome.too_late:
        yield (
            f"of these events, {outcome.too_late:,} are older than what the trainer still takes: they will be counted "
            "as late or orphaned, and not learned from"
        )
    if outcome.replayed_before:
        yield f"{outcome.replayed_before:,} were replayed before"
    if outcome.found:
        yield f"{outcome.found:,} are in the log already: a replay appended them and was interrupted before it said so"
    for code, count in sorted(outcome.refused.items()):
        hint = f"; {adopt_schema} takes them for events of the configured schema" if code == "schema_mismatch" else ""
        yield f"{count:,} would be refused again: {code}{hint}"
    for why, count in sorted(outcome.impossible.items()):
        yield f"{count:,} cannot be replayed: {why}"


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
