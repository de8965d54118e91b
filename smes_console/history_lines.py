"""The lines of a run's metrics over time, kept up to date: what was read once is not read again.

A run is what shares the root of its lineage; a folder may hold several, one after the other. Letters: T tasks of a
line, M figures, E experts.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from smes.arrays import F64
from smes.errors import SmesError
from trainer.history import history_files
from trainer.lineages import root_of

FIGURES = (
    "examples",
    "positives",
    "ranked",
    "base_rate",
    "auc",
    "gauc_windowed",
    "ne",
    "ece",
    "calibration",
    "xauc",
    "mae",
    "mean_bias",
)
"""The M figures of a task in a line, in the order of :attr:`Line.figures_TM`."""


class _Task(msgspec.Struct):
    examples: int = 0
    positives: int = 0
    ranked: float = 0
    base_rate: float | None = None
    auc: float | None = None
    gauc_windowed: float | None = None
    ne: float | None = None
    ece: float | None = None
    calibration: float | None = None
    xauc: float | None = None
    mae: float | None = None
    mean_bias: float | None = None


class _Written(msgspec.Struct):
    """A line as :func:`trainer.history.line_of` writes it; what is not named here is passed over."""

    stretch: int
    step: int
    lineage: str
    tasks: dict[str, _Task]
    wall_ms: int = 0
    event_time_ms: int | None = None
    trained: int = 0
    impressions: int = 0
    windows: int = 0
    experts: dict[str, Any] = msgspec.field(default_factory=dict)


_SHARES = ("load_share", "of_tasks", "drift_of_tasks")
_MOST_NAMES = 1000
_MOST_STACKS = 4
_stacks: list[tuple[tuple[int, ...], Sequence["Line"], F64]] = []  # the lines are kept, so their identity stays theirs
_stacks_lock = threading.Lock()
_NO_FIGURES = np.full(len(FIGURES), np.nan)
_decoder = msgspec.json.Decoder(_Written)


@dataclass(frozen=True, slots=True)
class Line:
    """One stretch of a run.

    Attributes:
        stretch, step, lineage, wall_ms, event_time_ms, trained, impressions, windows: As written.
        tasks: Names of the T tasks.
        figures_TM: float64, NaN where there is none; columns as :data:`FIGURES`.
        experts: As written, without the next.
        shares: ``load_share``, ``of_tasks`` and ``drift_of_tasks`` of the experts as written: of the newest segment
            that had ended. Lines of one segment share the object.
    """

    stretch: int
    step: int
    lineage: str
    wall_ms: int
    event_time_ms: int | None
    trained: int
    impressions: int
    windows: int
    tasks: tuple[str, ...]
    figures_TM: F64
    experts: dict[str, Any]
    shares: dict[str, Any]

    def task(self, name: str) -> dict[str, float | None]:
        """The figures of a task by name; empty if the line has no such task."""
        if name not in self.tasks:
            return {}
        values = self.figures_TM[self.tasks.index(name)].tolist()
        return {key: None if value != value else value for key, value in zip(FIGURES, values, strict=True)}


def line_of_json(written: bytes | dict[str, Any]) -> Line | None:
    """A line from its text or its JSON value; None if it is none."""
    try:
        value = _decoder.decode(written) if isinstance(written, bytes) else msgspec.convert(written, _Written)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    rows = [[_number(getattr(task, figure)) for figure in FIGURES] for task in value.tasks.values()]
    return Line(
        stretch=value.stretch,
        step=value.step,
        lineage=value.lineage,
        wall_ms=value.wall_ms,
        event_time_ms=value.event_time_ms,
        trained=value.trained,
        impressions=value.impressions,
        windows=value.windows,
        tasks=_shared(tuple(value.tasks)),
        figures_TM=np.array(rows, np.float64).reshape(len(rows), len(FIGURES)),
        experts={key: each for key, each in value.experts.items() if key not in _SHARES},
        shares={key: value.experts[key] for key in _SHARES if key in value.experts},
    )


def extend(lines: list[Line], found: Iterable[Line]) -> None:
    """Append lines; equal shares of neighbours become one object."""
    for line in found:
        if lines and lines[-1].shares == line.shares:
            line = replace(line, shares=lines[-1].shares)
        lines.append(line)


_names: dict[tuple[str, ...], tuple[str, ...]] = {}


def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """One object for equal names: lines are many, schemas are few."""
    if len(_names) > _MOST_NAMES:
        _names.clear()
    return _names.setdefault(names, names)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


@dataclass(slots=True)
class _File:
    inode: int
    offset: int  # bytes read, up to the end of a line
    lines: list[Line]


class FolderLines:
    """The lines of a folder. Thread-safe.

    Args:
        directory: Need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()

    def read(self) -> list[Line]:
        """All lines, oldest first; what is no line is passed over.

        Raises:
            SmesError: There is no such folder, or it cannot be read.
        """
        if not self.directory.is_dir():
            raise SmesError(
                f"{self.directory}: no such folder, expected one of trainer.history.directory or backtest --history"
            )
        with self._lock:
            try:
                paths = history_files(self.directory)
                self._files = {path: file for path in paths if (file := self._read(path)) is not None}
            except OSError as error:
                raise SmesError(f"{self.directory}: cannot be read: {error.strerror}") from error
            return [line for file in self._files.values() for line in file.lines]

    def _read(self, path: Path) -> _File | None:
        try:
            with path.open("rb") as stream:
                found = os.fstat(stream.fileno())
                file = self._files.get(path)
                if file is None or file.inode != found.st_ino or found.st_size < file.offset:
                    file = _File(found.st_ino, 0, [])
                if found.st_size > file.offset:
                    stream.seek(file.offset)
                    text, newline, _ = stream.read().rpartition(b"\n")
                    file.offset += len(text) + len(newline)
                    extend(file.lines, filter(None, map(line_of_json, text.splitlines())))
                return file
        except FileNotFoundError:
            return None  # it was the oldest


def figures_of(lines: Sequence[Line], task: str) -> F64:
    """The figures of one task: float64 [N, M], NaN where a line does not have it; not to be written to."""
    if not lines:
        return np.zeros((0, len(FIGURES)))
    names = lines[-1].tasks
    if all(line.tasks is names for line in lines):
        stacked_NTM = _stacked(lines)
        return stacked_NTM[:, names.index(task)] if task in names else np.full((len(lines), len(FIGURES)), np.nan)
    rows = [line.figures_TM[line.tasks.index(task)] if task in line.tasks else _NO_FIGURES for line in lines]
    return np.array(rows, np.float64)


def _stacked(lines: Sequence[Line]) -> F64:
    """The figures of all tasks: float64 [N, T, M]. Pages ask for one task after the other, of the same lines."""
    which = tuple(map(id, lines))
    with _stacks_lock:
        for n, (known, _, stack_NTM) in enumerate(_stacks):
            if known == which:
                _stacks.append(_stacks.pop(n))
                return stack_NTM
    stack_NTM = np.stack([line.figures_TM for line in lines])
    with _stacks_lock:
        _stacks.append((which, lines, stack_NTM))
        del _stacks[:-_MOST_STACKS]
    return stack_NTM


def runs_of(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Root of a lineage → its lines; the run whose line is the newest comes last."""
    runs: dict[str, list[Line]] = {}
    for line in lines:
        root = root_of(line.lineage)
        run = runs[root] = runs.pop(root, [])  # the newest stands last
        run.append(line)
    return runs
