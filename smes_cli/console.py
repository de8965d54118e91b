"""Output of the commands: tables and progress on a terminal, plain lines when piped, and reports as JSON files."""

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from smes.errors import SmesError

_PIPED_WIDTH = 10_000  # a pipe has no width, and rich would cut tables and lines at 80 columns


def _console(*, stderr: bool) -> Console:
    """A console that prints what it is given: brackets and colons in names and messages are no markup."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else _PIPED_WIDTH
    return Console(stderr=stderr, width=width, markup=False, emoji=False)


console = _console(stderr=False)
errors = _console(stderr=True)
_PLAIN_EVERY_S = 5.0
_RATE_OVER_S = 5.0


def set_up_logging(verbosity: int) -> None:
    """Set what is printed: -1 errors only; 0 also warnings and the commands' results; 1 or more everything."""
    console.quiet = verbosity < 0
    level = logging.ERROR if verbosity < 0 else logging.WARNING if verbosity == 0 else logging.DEBUG
    handler: logging.Handler
    if errors.is_terminal:
        handler = RichHandler(console=errors, show_path=False)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("smes").setLevel(level)
    for noisy in ("kafka", "numba", "asyncio", "httpx", "httpcore", "apscheduler"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))


class Advance(Protocol):
    """Shows the progress of a command."""

    def __call__(self, done: int, note: str = "") -> None:
        """Show that ``done`` units are done in total, with ``note`` beside the bar."""


class RecentRate:
    """A rate over the last seconds: unlike one over the whole run, it shows a pause and does not decay for ever.

    Args:
        over_s: How far back it looks.
        monotonic_s: A monotonic clock in seconds.
    """

    def __init__(self, over_s: float = _RATE_OVER_S, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._over_s, self._now_s = over_s, monotonic_s
        self._samples: deque[tuple[float, int]] = deque([(monotonic_s(), 0)])

    def __call__(self, done: int) -> float:
        """Units per second lately; ``done`` is how many are done in total."""
        now_s = self._now_s()
        self._samples.append((now_s, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - self._over_s:
            self._samples.popleft()
        then_s, then = self._samples[0]
        return (done - then) / (now_s - then_s) if now_s > then_s else 0.0


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """Show a progress bar on a terminal, and a line every few seconds otherwise."""
    if console.is_terminal and not console.quiet:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=note)
        return
    last_s = time.monotonic()

    def line(done: int, note: str = "") -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _PLAIN_EVERY_S:
            last_s = time.monotonic()
            of = f" of {total:,}" if total is not None else ""
            console.print(f"{what}: {done:,}{of} {note}".rstrip(), highlight=False, soft_wrap=True)

    yield line


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for a table cell; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def report_table(report: dict[str, Any]) -> Table:
    """The other sections of the report, one row each."""
    title = f"lineage {report['lineage']}, version {report['version']}"
    table = Table(show_header=False, title=title, box=box.HEAVY_HEAD if console.is_terminal else None)
    table.title_justify = "left"
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    sections = ("events", "feedback", "throughput", "freshness_ms", "snapshots", "scorer", "rows", "active_experts")
    for section in sections:
        parts = [f"{key} {number(value, 1)}" for key, value in report[section].items() if value is not None]
        if parts:
            table.add_row(section, " · ".join(parts))
    return table


def load_line(load_share: list[float], load_skew: float | None) -> str:
    """The load on the experts, in one line; empty for a ranker without experts."""
    if not load_share or load_skew is None:
        return ""
    shares = " ".join(f"{share:.1%}" for share in load_share)
    return f"expert load: {load_skew:.2f} times the mean on the busiest; by expert {shares}"


def routing_line(summary: dict[str, Any]) -> str:
    """The routing in its newest segment, in one line; see :class:`trainer.report.RoutingSummary`."""
    parts = [f"{number(summary['dead'])} dead experts", f"load skew {number(summary['load_skew'], 2)}"]
    if summary["overlap"] is not None:
        parts.append(f"overlap of two tasks {number(summary['overlap'], 2)}")
    if summary["drift"] is not None:
        parts.append(f"drift {number(summary['drift'], 2)} since the segment before")
    return f"routing in the last {number(summary['segment_steps'])} steps: {', '.join(parts)}"


def write_report(report: dict[str, Any], path: Path | None, *, indent: int | None = 2) -> None:
    """Write a report as JSON, if a path is given.

    Raises:
        SmesError: The file cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise SmesError(f"report {path}: cannot be written: {error.strerror}") from error


def read_report(path: Path, output: str) -> dict[str, Any]:
    """Read a report that another process wrote.

    Args:
        path: The file.
        output: The last output of that process, for the error message.

    Raises:
        SmesError: There is no report.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmesError(f"report {path.name}: missing, expected one from its process ({error}):\n{output}") from error
    return report
