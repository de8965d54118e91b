"""Where the lines of runs come from: a folder, or a trainer that is asked for what is new."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smes.errors import SmesError
from smes_console.history_lines import FolderLines, Line, extend, line_of_json
from smes_console.sources import Reached, Sources
from trainer.history import EXPERTS, REPORT
from trainer.lineages import root_of

_Object = dict[str, Any]
_MOST_LIVE = 5000


@dataclass(frozen=True, slots=True)
class Found:
    """Lines and where they are from.

    Attributes:
        kind: ``folder``, ``trainer``, or None where there are none.
        where: The folder or the trainer's address.
        lines: Oldest first.
        problem: Why there are none, or no new ones; None where all is well.
        since_ms: Since when.
    """

    kind: str | None
    where: str | None
    lines: list[Line]
    problem: str | None
    since_ms: int | None

    def state(self) -> _Object:
        """What a page is told of it beside the lines."""
        return {
            "kind": self.kind,
            "where": self.where,
            "lines": len(self.lines),
            "problem": self.problem,
            "since_ms": self.since_ms,
        }


class Runs:
    """The run that is watched, and those that it is compared with. Thread-safe.

    Args:
        sources: Where everything is.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        places = sources.places
        self._folder = None if places.history is None else FolderLines(places.history)
        self._baselines = {name: FolderLines(path) for name, path in (places.baselines or {}).items()}
        self._live = _LiveLines(sources)

    def watched(self) -> Found:
        """The lines of the run that is watched: those of the folder, unless the trainer's are of another run.

        A folder that is away or empty leaves those that the trainer has kept.
        """
        trainer = self._sources.trainer_brief() if self._sources.places.trainer_url is not None else None
        lineage = (trainer.value or {}).get("lineage") if trainer is not None else None
        folder = self._of_folder()
        if folder is not None and folder.lines and (lineage is None or _is_of(lineage, folder.lines[-1])):
            return folder
        if trainer is not None:
            live = self._live.read()
            if live.lines or folder is None:
                return live
        if folder is not None:
            return folder
        return Found(None, None, [], "no history: give --history or --trainer, or configure trainer.history", None)

    def _of_folder(self) -> Found | None:
        if self._folder is None:
            return None
        folder = self._folder
        return _found("folder", str(folder.directory), self._sources.look("history", folder.read))

    def baselines(self) -> dict[str, Found]:
        """Name → the lines of another run."""
        return {
            name: _found("folder", str(folder.directory), self._sources.look(f"baseline {name}", folder.read))
            for name, folder in self._baselines.items()
        }

    def report(self) -> tuple[_Object | None, _Object]:
        """The report of the run that is watched, and what a page is told of where it comes from.

        A running trainer says it; a run that has ended left it in the folder of its history.
        """
        return self._said_or_written("report", self._sources.trainer_brief, REPORT)

    def report_of_ended(self) -> _Object | None:
        """The report that a run left in the folder of its history when it ended; None without one."""
        written = self._written(REPORT)
        report = None if written is None or written.value is None else written.value[0]
        return report if report is not None and {"events", "feedback"} <= report.keys() else None

    def experts(self) -> tuple[_Object | None, _Object]:
        """The experts over time (:mod:`trainer.experts_over_time`), likewise."""
        return self._said_or_written("experts", self._sources.trainer, EXPERTS)

    def _said_or_written(
        self, key: str, ask: Callable[[], Reached[_Object]], name: str
    ) -> tuple[_Object | None, _Object]:
        problem, since_ms = f"no {key}: no trainer and no folder is known", None
        if self._sources.places.trainer_url is not None:
            said = ask()
            value = (said.value or {}).get(key)
            if isinstance(value, dict):
                at_ms = (said.value or {}).get("report_at_ms") or said.at_ms
                return value, {"kind": "trainer", "at_ms": at_ms, **said.state()}
            problem, since_ms = said.problem or f"the trainer has no {key} yet", said.since_ms
        if (written := self._written(name)) is not None:
            if written.value is not None:
                value, at_ms = written.value
                return value, {"kind": "folder", "at_ms": at_ms, **written.state()}
            if self._sources.places.trainer_url is None:
                problem, since_ms = written.problem or problem, written.since_ms
        return None, {"kind": None, "at_ms": None, "problem": problem, "since_ms": since_ms}

    def _written(self, name: str) -> Reached[tuple[_Object, int]] | None:
        """What a run left in its folder under a name, and when; None without a folder."""
        if self._folder is None:
            return None
        path = self._folder.directory / name
        return self._sources.look(name, lambda: _read(path))


def _is_of(lineage: str, line: Line) -> bool:
    return root_of(lineage) == root_of(line.lineage)


def _found(kind: str, where: str, look: Reached[list[Line]]) -> Found:
    lines = look.value or []
    problem = look.problem
    if not lines and problem is None:
        problem = f"{where}: no line yet, expected one when the first window of the evaluation has closed"
    return Found(kind, where, lines, problem, look.since_ms)


def _read(path: Path) -> tuple[_Object, int]:
    try:
        value, written_ms = json.loads(path.read_bytes()), round(path.stat().st_mtime * 1000)
    except FileNotFoundError as error:
        raise SmesError(f"{path}: no such file, expected one when the run has ended") from error
    if not isinstance(value, dict):
        raise SmesError(f"{path}: expected an object of JSON")
    return value, written_ms


class _LiveLines:
    """The newest lines of a trainer, each asked for once."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._lines: list[Line] = []
        self._after: int | None = None
        self._lock = threading.Lock()

    def read(self) -> Found:
        where = self._sources.places.trainer_url
        with self._lock:
            look = self._sources.trainer_history(after=self._after)
            if look.value is not None and not self._take(look.value):
                # Another process, which writes lines again: what is known of the last one is of no use.
                self._lines, self._after = [], None
                look = self._sources.trainer_history()
                if look.value is not None:
                    self._take(look.value)
            del self._lines[:-_MOST_LIVE]
            return _found("trainer", where or "", Reached(list(self._lines), look.problem, look.at_ms, look.since_ms))

    def _take(self, answer: _Object) -> bool:
        """Take what is new; False where it does not go on from what is known."""
        found = [line for line in map(line_of_json, answer.get("lines") or ()) if line is not None]
        follows = answer.get("next")
        if self._after is not None and isinstance(follows, int) and follows < self._after:
            return False
        if self._lines and found:
            last = self._lines[-1]
            if found[-1].stretch <= last.stretch and found[-1].lineage == last.lineage:
                return True  # the answer before, from the cache
            if found[0].stretch <= last.stretch or not _is_of(found[0].lineage, last):
                return False
        extend(self._lines, found)
        if isinstance(follows, int):
            self._after = follows
        return True
