"""A run's metrics over time, in files of a folder: ``history-000001.jsonl``, …; the newest line comes last.

A line is an object of JSON (:func:`trainer.history_line.line_of`). Lines are bounded: when a file is full the next one
begins, and the oldest ones go. A trainer that goes on from a checkpoint first takes out the lines of after it: it
writes them again. A run that has ended leaves its report there, too, and its experts over time.

Imports no torch: whoever reads a folder needs none.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smes.errors import SmesError
from trainer.lineages import root_of

_NAME = re.compile(r"history-(\d{6,})\.jsonl")
REPORT, EXPERTS = "report.json", "experts.json"
"""What a run that has ended leaves beside its lines: its report, and its experts as ``/v1/stats`` of a trainer has them
(:mod:`trainer.experts_over_time`). Neither is there while a run goes on, or after it was killed."""

_KINDS = {"stretch": int, "step": int, "lineage": str, "tasks": dict}
_READ = {"wall_ms", "event_time_ms", "impressions", "trained", "experts", "rows", "lag"}  # what readers need, too

_FILES = 4  # full ones that hold as many lines as are kept

_logger = logging.getLogger(__name__)


class HistoryFiles:
    """Appends lines for one writer.

    Attributes:
        failures: Lines that could not be written.

    Args:
        directory: Created if missing.
        keep: So many of the newest lines are kept at least.

    Raises:
        SmesError: The folder cannot be created.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory, keep
        self._most = max(1, -(-keep // _FILES))  # lines of a file
        self.failures = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SmesError(f"history folder {directory}: cannot be created: {error.strerror}") from error
        self._counts: dict[Path, int] = {}  # lines of each file, oldest first

    def begin(self, lineage: str, step: int, stretch: int | None) -> None:
        """Go on in a lineage: later lines of it, and of its forks, are taken out, what is torn, and an end's files.

        Args:
            lineage: Of the trainer.
            step: Steps that it has taken.
            stretch: Number of its next stretch; None: any.

        Raises:
            SmesError: The folder cannot be read or written.
        """
        try:
            for name in (REPORT, EXPERTS):
                (self._directory / name).unlink(missing_ok=True)
            for path in history_files(self._directory):
                text = path.read_text(encoding="utf-8", errors="replace")
                kept = [line for line in text.splitlines() if _stays(line, root_of(lineage), step, stretch)]
                if not kept:
                    path.unlink()
                    continue
                if (new := "".join(f"{line}\n" for line in kept)) != text:
                    _replace(path, new)
                self._counts[path] = len(kept)
        except OSError as error:
            raise SmesError(f"history folder {self._directory}: cannot be read: {error.strerror}") from error

    def append(self, line: dict[str, Any]) -> None:
        """Write a line. If that fails, it is logged, and the training goes on."""
        newest = next(reversed(self._counts), None)
        if newest is None or self._counts[newest] >= self._most:
            number = 1 if newest is None else _number(newest) + 1
            newest = self._directory / f"history-{number:06d}.jsonl"
            self._counts[newest] = 0
        try:
            with newest.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._counts[newest] += 1
            for oldest in list(self._counts):
                if sum(self._counts.values()) - self._counts[oldest] < self._keep:
                    break
                oldest.unlink(missing_ok=True)
                del self._counts[oldest]
        except OSError as error:
            self.failures += 1
            _logger.error("history %s: a line could not be written: %s", newest, error.strerror)


def write_end(directory: Path, report: dict[str, Any], experts: dict[str, Any]) -> None:
    """Write what a run leaves that has ended; what is there already is replaced.

    Args:
        directory: Of its lines.
        report: As ``--report`` has it.
        experts: As ``/v1/stats`` of a trainer has them.

    Raises:
        SmesError: A file cannot be written.
    """
    for name, values in ((REPORT, report), (EXPERTS, experts)):
        try:
            _replace(directory / name, json.dumps(values, allow_nan=False) + "\n")
        except OSError as error:
            raise SmesError(f"{directory / name}: cannot be written: {error.strerror}") from error


def read_history(directory: Path) -> Iterator[dict[str, Any]]:
    """All lines, oldest first; what is no line is passed over, as the last one may be while it is written.

    Raises:
        SmesError: There is no such folder, or it cannot be read.
    """
    if not directory.is_dir():
        raise SmesError(f"{directory}: no such folder, expected one of trainer.history.directory or --history")
    for path in history_files(directory):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue  # it was the oldest
        except OSError as error:
            raise SmesError(f"{path}: cannot be read: {error.strerror}") from error
        yield from (line for line in map(_parsed, text.splitlines()) if line is not None and line.keys() >= _READ)


def history_files(directory: Path) -> list[Path]:
    """The files of a history, the oldest first."""
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None, "only such files are listed"
    return int(found[1])


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    is_line = isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in _KINDS.items())
    return value if is_line else None


def _stays(line: str, root: str, step: int, stretch: int | None) -> bool:
    value = _parsed(line)
    if value is None:
        return False
    if root_of(value["lineage"]) != root or value["step"] < step:
        return True
    return bool(value["step"] == step and (stretch is None or value["stretch"] < stretch))


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
