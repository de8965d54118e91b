"""Where batches ended, written down before they are trained on: a restart ends them at the same places.

A batch that the wall clock ended could not be repeated from the log alone. So each batch that is handed out adds one
line to a file beside the checkpoints: the number of its last example, counted from 1 in the order in which the join
emits, and the CRC-32 of that number::

    4096 5d3c1ad4
    4133 0e0f9b1b

Where several ranks train together, each has such a file for its batches, and rank 0 one for the steps: the number of a
step, and the ranks that took part in it with a batch, as the bits of a hexadecimal number::

    17 3 8a3d4c1e

The numbers grow. A line is written, not flushed to the disk: it survives the death of the process, not that of the
machine. Reading stops at the first line that is damaged or out of order; from there on the clock ends batches anew.
"""

import logging
import os
import zlib
from collections import deque
from itertools import takewhile
from pathlib import Path

_logger = logging.getLogger(__name__)

NAME = "batches.journal"
"""Name of the file in the folder of checkpoints."""

STEPS = "steps.journal"
"""Name of that of the steps of several ranks."""


def name_of(rank: int, size: int) -> str:
    """Name of the file of one of several ranks."""
    return NAME if size == 1 else f"batches.rank-{rank}-of-{size}.journal"


class BatchJournal:
    """The ends of the batches that were handed out since the oldest checkpoint that is kept.

    Args:
        path: The file; it is made with the first line.
        keep: How many checkpoints are kept. What none of them would repeat is removed.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._saved: deque[int] = deque(maxlen=keep)
        self._ends: list[tuple[int, str]] = []  # with their notes
        self._file: int | None = None
        self._is_resumed = self._is_failing = self._is_trim_due = False

    def resume(self, ended: int) -> list[int]:
        """Go on after a restart; the ends to repeat, in order.

        Args:
            ended: How many examples were in batches that had ended when the checkpoint was taken.
        """
        return [end for end, _ in self.resume_noted(ended)]

    def resume_noted(self, ended: int) -> list[tuple[int, str]]:
        """As :meth:`resume`, each end with its note."""
        self._is_resumed = True
        self._ends = _read(self.path)
        self._saved.append(ended)
        return [(end, note) for end, note in self._ends if end > ended]

    def add(self, end: int, note: str = "") -> None:
        """Write down the end of a batch that is about to be trained on, unless that was done before a restart.

        A note is one word. If the disk refuses it, that is logged, and training goes on: a restart may then end batches
        elsewhere.
        """
        if not self._is_resumed:  # training began anew: what is in the folder is of another history
            self.clear()
        if self._ends and end <= self._ends[-1][0]:
            return
        if self._is_trim_due:
            self._trim()
        self._ends.append((end, note))
        try:
            if self._file is None:
                self._write_anew()
            else:
                _write(self._file, _line(end, note))
        except OSError as error:
            self._close()  # the next one writes all of them
            if not self._is_failing:
                _logger.error(
                    "%s: not written: %s; after a restart, batches that the clock ended may end elsewhere",
                    self.path,
                    error.strerror or error,
                )
            self._is_failing = True
            return
        self._is_failing = False

    def saved(self, ended: int) -> None:
        """Note that a checkpoint is on disk. Any thread may call it.

        The next line removes what only checkpoints before the kept ones would repeat.

        Args:
            ended: As of :meth:`resume`.
        """
        self._saved.append(ended)
        self._is_trim_due = True

    def clear(self) -> None:
        """Forget everything: what comes cannot be counted from what was written."""
        self._is_resumed = True
        self._ends = []
        self._close()
        self.path.unlink(missing_ok=True)

    def _trim(self) -> None:
        self._is_trim_due = False
        if len(self._saved) == self._saved.maxlen and self._ends and self._ends[0][0] <= self._saved[0]:
            self._ends = [(end, note) for end, note in self._ends if end > self._saved[0]]
            self._close()  # the file is written anew, without the others

    def _write_anew(self) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _write(file, b"".join(_line(*each) for each in self._ends))
            partial.replace(self.path)
        except OSError:
            os.close(file)
            partial.unlink(missing_ok=True)
            raise
        self._file = file

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _line(end: int, note: str) -> bytes:
    said = f"{end} {note}".rstrip().encode()
    return b"%b %08x\n" % (said, zlib.crc32(said))


def _write(file: int, text: bytes) -> None:
    if os.write(file, text) != len(text):
        raise OSError("the disk took only a part of it")


def _read(path: Path) -> list[tuple[int, str]]:
    """The ends and notes in a file, up to the first line that is not whole; none if there is no file."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        _logger.error("%s: cannot be read: %s; batches may end elsewhere", path, error.strerror)
        return []
    ends: list[tuple[int, str]] = []

    def is_next(line: bytes) -> bool:
        number, *notes, _ = line.split(b" ") if b" " in line else (line, b"")
        note = b" ".join(notes).decode(errors="replace")
        if not number.isdigit() or len(number) > 18 or line != _line(int(number), note):
            return False
        if ends and int(number) <= ends[-1][0]:
            return False
        ends.append((int(number), note))
        return True

    good = sum(1 for _ in takewhile(is_next, lines))
    if good < len(lines) and lines[good].endswith(b"\n"):  # else the process died while it wrote its last line
        _logger.warning(
            "%s: line %d is %r, expected the end of a batch after %d and its CRC-32: from there on batches may end "
            "elsewhere than before the restart",
            path,
            good + 1,
            lines[good][:60],
            ends[-1][0] if ends else 0,
        )
    return ends
