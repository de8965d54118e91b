"""``smes join``: its options."""

from typing import Annotated

import typer

from smes.errors import Stopped
from smes_cli.collection import uncollected
from smes_cli.command_line import ReportPath, SchemaOfEvents, config_of, stop_signals
from smes_cli.console import console, number


def join(
    context: typer.Context,
    schema: SchemaOfEvents = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="After a stop signal, first join everything that is in the log by then.")
    ] = False,
    flush: Annotated[
        bool,
        typer.Option(
            "--flush",
            help="After a stop signal, drain, then close the open windows and write what still waits for feedback: for "
            "the end of a finite log.",
        ),
    ] = False,
    skip_lost: Annotated[
        bool,
        typer.Option(
            "--skip-lost",
            help="Continue at the oldest record of a partition that no longer holds the checkpoint's position.",
        ),
    ] = False,
    anew: Annotated[
        bool,
        typer.Option(
            "--anew",
            help="Without a checkpoint: join the event log from its beginning, though the topic has examples already.",
        ),
    ] = False,
    report: ReportPath = None,
) -> None:
    """Join feedback to impressions, and write the examples to a topic for `smes train --examples`, until stopped."""
    with uncollected():
        config = config_of(context, schema)
        config.schema_file()
        from smes_cli.join import run_join

    with stop_signals() as should_stop:
        try:
            result = run_join(
                config,
                report=report,
                drain=drain,
                flush=flush,
                skip_lost=skip_lost,
                anew=anew,
                should_stop=should_stop,
                stop_event=should_stop,
            )
        except Stopped as stopped:
            console.print(f"stopped before the join began: {stopped}", highlight=False)
            return
    ledger = result.ledger
    console.print(
        f"{number(ledger.handed_out)} impressions in {number(result.turns)} turns written; {number(ledger.waiting)} "
        f"wait; late {number(ledger.late)}, duplicate {number(ledger.duplicate)}, dead-lettered "
        f"{number(ledger.dead_lettered)}; feedback attached {number(ledger.attached + ledger.corrected)}, late "
        f"{number(ledger.feedback_late)}, orphaned {number(ledger.orphaned)}, duplicate "
        f"{number(ledger.feedback_duplicate)}",
        highlight=False,
        soft_wrap=True,
    )
