"""What the subcommands share: options, the configuration in force, and SIGINT and SIGTERM as a request to stop.

Nothing here imports what a command runs: ``smes --help`` must be quick.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from smes_cli.config import Config

LogPath = Annotated[Path, typer.Argument(help="A KuaiRand folder, or a folder or file that the schema file describes.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many impressions in time order.", min=0)]
Seed = Annotated[int, typer.Option(help="Seed of the feedback delays.")]
ReportPath = Annotated[Path | None, typer.Option("--report", help="Write the report here, as JSON.")]
SchemaName = Annotated[
    str | None,
    typer.Option("--schema", help="Schema file, or kuairand or synthetic; default: recognized by the log's files."),
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

    config = load_config(context.obj)
    return config if schema is None else replace(config, schema=schema)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into the answer to "should I stop?" within the block.

    A second SIGINT raises :class:`KeyboardInterrupt` as usual.
    """
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set() and number == SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal(number, stop) for number in (SIGINT, SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal(number, handler)
