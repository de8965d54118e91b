"""``smes train``: its options."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from smes.errors import Stopped
from smes_cli.collection import uncollected
from smes_cli.command_line import ReportPath, SchemaOfEvents, config_of, stop_signals
from smes_cli.console import console, report_table
from smes_cli.preloading import torch_preloaded
from smes_cli.ranks import as_rank, begin_rank, rank_place, require_shareable
from smes_cli.task_tables import print_tasks
from smes_cli.times import unix_ms_of
from smes_io.clock import wall_clock_ms


def train(
    context: typer.Context,
    schema: SchemaOfEvents = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="After a stop signal, first train on everything that is in the log by then.")
    ] = False,
    skip_lost: Annotated[
        bool,
        typer.Option(
            "--skip-lost",
            help="Continue at the oldest record of a partition that no longer holds the checkpoint's position.",
        ),
    ] = False,
    flush: Annotated[
        bool,
        typer.Option(
            "--flush",
            help="After a stop signal, drain, then close the open windows and train on what still waits for feedback: "
            "for the end of a finite log.",
        ),
    ] = False,
    from_snapshot: Annotated[
        bool,
        typer.Option(
            "--from-snapshot",
            help="Without a checkpoint: go on from the snapshot in service, with optimisers that begin anew.",
        ),
    ] = False,
    anew: Annotated[
        bool, typer.Option("--anew", help="Without a checkpoint: start over, and replace the model in service.")
    ] = False,
    change_schema: Annotated[
        bool,
        typer.Option(
            "--change-schema",
            help="Carry a checkpoint of another schema over to the configured one (smes schema diff says what that "
            "means); without effect where it has this schema already.",
        ),
    ] = False,
    from_folder: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with what `smes backtest --checkpoint` has written there, as a new lineage. The folder of this "
            "trainer's own checkpoints must be empty.",
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            help="With --from: read what arrived in the event log from this time on: 2026-11-27T20:00 (UTC), Unix "
            "milliseconds, or an age as 15m, 2h, 7d. Default: what can follow the newest impression of the primed log.",
        ),
    ] = None,
    examples: Annotated[
        bool,
        typer.Option(
            "--examples",
            help="Read the examples that `smes join`, or a join of your own, writes, and join nothing. Several "
            "trainers, each with its own folders and namespace of the store, may read them.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="Train with so many processes on this machine, which share out partitions and rows; each needs a "
            "partition. When one dies, all go on from the last checkpoint. torchrun starts them on several machines.",
            min=1,
        ),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", help="With --workers: how often they are started again in all.", min=0)
    ] = 3,
    report: ReportPath = None,
) -> None:
    """Train from the event log until stopped (Ctrl-C, SIGTERM); the last cut is then published and on disk."""
    place = rank_place()
    if place is not None and workers not in (None, place.size):
        raise ValueError(f"--workers {workers}: this is one of {place.size} ranks that torchrun has started")
    if place is not None and place.size > 1:
        begin_rank(place)
    with uncollected(), torch_preloaded():
        config = config_of(context, schema)
        # Mistakes in options and schema files are told before torch is imported.
        config.schema_file()
        since_ms = _since_ms(since, from_folder, from_snapshot=from_snapshot)
        if change_schema and from_folder is not None:
            raise ValueError("--change-schema --from: expected at most one of the two")
        from smes_cli.schema_changes import declared_changes

        declared_changes(config)
        ranks = place.size if place else workers or 1
        if examples:
            from smes_cli.train_examples import require_trainable_on_examples

            require_trainable_on_examples(ranks=ranks, from_folder=from_folder is not None, change_schema=change_schema)
        require_shareable(config, ranks)
        if ranks > 1 and from_folder is not None:
            raise ValueError("--from: expected one rank; what it writes, any number of ranks can go on from")
        if place is None and ranks > 1:
            from smes_cli.launch import launch

            raise typer.Exit(launch(ranks, sys.argv[1:], max_restarts=max_restarts))
        from smes_cli.primed_start import PrimedStart
        from smes_cli.starting_point import WithoutCheckpoint
        from smes_cli.train import run_train

    with stop_signals() as should_stop, as_rank(place, config, should_stop) as world:
        try:
            result = run_train(
                config,
                report=report,
                drain=drain,
                skip_lost=skip_lost,
                should_stop=should_stop,
                stop_event=should_stop,
                flush=flush,
                without_checkpoint=WithoutCheckpoint(from_snapshot=from_snapshot, anew=anew),
                primed=None if from_folder is None else PrimedStart(from_folder, since_ms),
                change_schema=change_schema,
                world=world,
                examples=examples,
            )
        except Stopped as stopped:
            console.print(f"stopped before the training began: {stopped}", highlight=False)
            return
        if result is None:
            return
    figures = result.to_dict()
    print_tasks(figures)
    console.print(report_table(figures))


def _since_ms(since: str | None, folder: Path | None, *, from_snapshot: bool) -> int | None:
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
