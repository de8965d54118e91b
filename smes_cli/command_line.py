"""What the subcommands share: options, the configuration in force, and SIGINT and SIGTERM as a request to stop.

Nothing here imports what a command runs: ``smes --help`` must be quick.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from smes.errors import SmesError

if TYPE_CHECKING:
    from smes_cli.config import Config


EXIT_CHECK_FAILED = 3
"""Exit code of a command that ran to its end and whose check failed."""


def writable(path: Path | None) -> Path | None:
    """Check before a run that its report, or another file of it, can be written.

    Raises:
        SmesError: It cannot.
    """
    if path is None:
        return None
    folder, problem = path.parent, None
    if path.is_dir():
        problem = errno.EISDIR
    elif not folder.is_dir():
        problem = errno.ENOENT
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = errno.EACCES
    if problem is not None:
        raise SmesError(f"{path}: cannot be written: {os.strerror(problem)}")
    return path


LogPath = Annotated[
    Path,
    typer.Argument(
        help="The log: a folder or a file as its schema file describes. Logs of KuaiRand and of `smes "
        "synthesize` need no --schema."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many impressions in time order.", min=0)]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the feedback delays; default: replay.seed of the configuration.")
]
ReportPath = Annotated[Path | None, typer.Option("--report", help="Write the report here, as JSON.", callback=writable)]
SchemaName = Annotated[
    str | None,
    typer.Option(
        "--schema",
        help="Schema file, or kuairand or synthetic; default: that of the configuration, else recognized by the log's "
        "files.",
    ),
]
MaxRejected = Annotated[
    float | None,
    typer.Option(
        help="Largest share of the log's rows that may be unusable; default: log.max_rejected of the schema file.",
        min=0,
        max=1,
    ),
]
SchemaOfEvents = Annotated[
    str | None,
    typer.Option("--schema", help="Schema file, or kuairand or synthetic; default: that of the configuration."),
]
ScorerUrl = Annotated[
    str | None,
    typer.Option("--url", help="Base URL of the scorer; default: scorer.host and scorer.port of the configuration."),
]


def config_of(context: typer.Context, schema: str | None = None) -> "Config":
    """The configuration that a command runs with.

    Args:
        context: Of the command; holds the path that ``--config`` named, if any.
        schema: The command's ``--schema``, which overrides the configured one.

    Raises:
        ValueError: The configuration is wrong.
    """
    from smes_cli.config import load_config

    return load_config(context.obj, schema=schema)


class StopRequest(threading.Event):
    """An event that is set by a stop signal; called, it answers "should I stop?"."""

    _asked = False

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked or self.is_set()

    def ask(self) -> None:
        """Ask for the stop, from a signal handler.

        The handler interrupts its thread anywhere, also inside of this event's ``wait``, which holds the event's lock
        for a moment: setting the event there would wait for that lock for ever. So another thread sets it.
        """
        self._asked = True
        threading.Thread(target=self.set, name="stop-request", daemon=True).start()


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request to stop within the block.

    A second SIGINT raises :class:`KeyboardInterrupt` as usual.
    """
    stopped = StopRequest()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped() and number == SIGINT:
            raise KeyboardInterrupt
        stopped.ask()

    before = {number: signal(number, stop) for number in (SIGINT, SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal(number, handler)
