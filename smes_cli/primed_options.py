"""The options of ``smes backtest`` and ``smes train`` by which a log in files primes the live loop."""

from pathlib import Path
from typing import Annotated

import typer

from smes_cli.letter_text import unix_ms_of
from smes_io.clock import wall_clock_ms

CheckpointFolder = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Write the trained state into this empty folder: `smes train --from` goes on from it on a live event log.",
    ),
]
FromFolder = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Begin with what `smes backtest --checkpoint` has written there, as a new lineage. The folder of this "
        "trainer's own checkpoints must be empty.",
    ),
]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        help="With --from: read what arrived in the event log from this time on: 2026-11-27T20:00 (UTC), Unix "
        "milliseconds, or an age as 15m, 2h, 7d. Default: what can follow the newest impression of the primed log.",
    ),
]


def since_ms_of(since: str | None, folder: Path | None, *, from_snapshot: bool) -> int | None:
    """The time of ``--since``, Unix milliseconds; None without one.

    Raises:
        ValueError: It is no time, or the options contradict each other.
    """
    if folder is not None and from_snapshot:
        raise ValueError("--from --from-snapshot: expected at most one of the two")
    if since is None:
        return None
    if folder is None:
        raise ValueError(f"--since {since}: expected --from beside it; a checkpoint of a live training has positions")
    return unix_ms_of("--since", since, wall_clock_ms())
