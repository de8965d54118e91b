"""Where audits have ended: from there the next one can count, when retention has taken what lies before.

A mark says how many events a trainer had counted when it had read up to an offset. It is only kept by an audit that
balanced, so what it says was recounted once. A file of marks holds one JSON object per line::

    {"topic": "impressions", "partition": 0, "log": …, "began": 0, "position": 4711, "read": 9000,
     "dead_lettered": 12, "gaps": 0}
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from smes.errors import SmesError

_KEPT = 100  # marks per partition


class Mark(msgspec.Struct, frozen=True):
    """One mark.

    Attributes:
        topic, partition, log: Of which incarnation of which partition.
        began: Where the reading of it began.
        position: The next offset to read.
        read, dead_lettered, gaps: As :class:`stream.sources.Counted`, when the position was reached.
    """

    topic: str
    partition: int
    log: str
    began: int
    position: int
    read: int
    dead_lettered: int
    gaps: int


def read_marks(path: Path) -> list[Mark]:
    """The marks in a file, oldest first; none where there is no file.

    Raises:
        ValueError: The file holds something else; the message names the line.
        OSError: It cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    marks = []
    for number, line in enumerate(lines, 1):
        try:
            marks.append(msgspec.json.decode(line, type=Mark))
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise ValueError(f"{path}, line {number}: expected a mark of an audit: {error}") from error
    return marks


def write_marks(path: Path, marks: Sequence[Mark]) -> None:
    """Write a file anew, with the newest marks of each partition.

    Raises:
        SmesError: The disk refused it; the file is as it was.
    """
    kept: dict[tuple[str, int], list[Mark]] = {}
    for mark in marks:
        kept.setdefault((mark.topic, mark.partition), []).append(mark)
    newest = [mark for each in kept.values() for mark in each[-_KEPT:]]
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(b"".join(msgspec.json.encode(mark) + b"\n" for mark in newest))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SmesError(f"marks {path}: cannot be written: {error.strerror}") from error


def oldest_that_counts(marks: Iterable[Mark], here: Mark, begin: int) -> Mark | None:
    """The mark from which most can be recounted.

    Args:
        marks: Any.
        here: What the checkpoint says now.
        begin: The oldest offset that the log still has.

    Returns:
        The one with the smallest position in the log, up to where the checkpoint is, of the same reading.
    """
    same = (here.topic, here.partition, here.log, here.began)
    usable = [
        mark
        for mark in marks
        if (mark.topic, mark.partition, mark.log, mark.began) == same and begin <= mark.position <= here.position
    ]
    return min(usable, key=lambda mark: mark.position, default=None)
