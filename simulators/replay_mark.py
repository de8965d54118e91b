"""How far a replay has come, in a file, so that another one can go on there."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from simulators.replay import ReplayReport

_INTERVAL_S = 1.0

Count = Annotated[int, Meta(ge=0)]


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a replay has come.

    Attributes:
        what: What decides which events come in which order, and where they go; another replay with the same ``what``
            goes on here.
        impressions, feedback: Events appended.
        finished: Whether the whole log was.
    """

    what: dict[str, str]
    impressions: Count = 0
    feedback: Count = 0
    finished: bool = False


class MarkFile:
    """The mark of a replay in a file.

    It is written after an append, at most once a second, and when the replay ends. So a replay that is killed repeats
    what it appended within its last second. The join counts these events as duplicates and uses the first ones.

    Args:
        path: The file.
        what: See :attr:`Mark.what`.
        monotonic_s: A monotonic clock in seconds.
    """

    def __init__(self, path: Path, what: dict[str, str], monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._path, self._what, self._now_s = path, what, monotonic_s
        self._written_s = -_INTERVAL_S

    def read(self) -> Mark:
        """The mark to go on from; that of the beginning if there is no file.

        Raises:
            ValueError: The file has no mark, or one of another replay; the message names what differs.
            OSError: It cannot be read.
        """
        try:
            mark = msgspec.json.decode(self._path.read_bytes(), type=Mark)
        except FileNotFoundError:
            return Mark(self._what)
        except msgspec.DecodeError as error:
            raise ValueError(f"{self._path}: {error}, expected the mark of a replay, or no file") from error
        names = [name for name in {**mark.what, **self._what} if mark.what.get(name) != self._what.get(name)]
        if names:
            differing = ", ".join(f"{n} {self._what.get(n, 'none')}, there {mark.what.get(n, 'none')}" for n in names)
            raise ValueError(
                f"{self._path}: the mark of another replay ({differing}); expected that of this one, or another file: "
                "without a file, the replay begins at the log's beginning"
            )
        return mark

    def write_if_due(self, report: ReplayReport) -> None:
        """Write how far the replay is, unless that was done within the last second."""
        if self._now_s() - self._written_s >= _INTERVAL_S:
            self.write(report)

    def write(self, report: ReplayReport) -> None:
        """Write how far the replay is; a crash leaves the mark before it or this one."""
        mark = Mark(self._what, report.impressions, report.feedback, report.finished)
        partial = self._path.with_name(f"{self._path.name}.partial")
        with partial.open("wb") as file:
            file.write(msgspec.json.encode(mark))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        self._written_s = self._now_s()
