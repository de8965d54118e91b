"""``smes audit``: whether everything that is in the event log is accounted for."""

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from smes.errors import CheckpointError
from smes_cli.command_line import EXIT_CHECK_FAILED, SchemaOfEvents, config_of, writable
from smes_cli.console import console, errors, number, progress

if TYPE_CHECKING:
    from stream.audit_result import AuditResult

_COLUMNS = (
    "appended", "read", "trained", "waiting", "late", "duplicate", "orphaned", "dead_lettered", "dropped", "unread",
    "trimmed_unread", "gaps", "reinjected",
)  # fmt: skip


def audit(
    context: typer.Context,
    schema: SchemaOfEvents = None,
    marks: Annotated[
        Path | None,
        typer.Option(
            help="A file that remembers where audits have ended: what was audited once may be trimmed before the next.",
            callback=writable,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recount the event log against the ledgers of the newest checkpoint. Changes nothing; exits with 3 if it fails."""
    config = config_of(context, schema)
    from smes_cli.schema_changes import declared_changes
    from smes_cli.stream_state import newest_stream_state
    from stream.audit import audit as recount
    from stream.audit_marks import read_marks, write_marks
    from stream.joined.joined_stream import is_of_examples
    from stream.log.open_log import open_event_log

    if config.trainer.checkpoint.directory is None:
        raise ValueError("trainer.checkpoint.directory: not set, expected the folder of the trainer's checkpoints")
    state = newest_stream_state(config)
    if state is None:
        raise CheckpointError(
            f"checkpoint folder {config.trainer.checkpoint.directory}: no checkpoint, expected one to audit"
        )
    if is_of_examples(state.arrays):
        raise CheckpointError(
            f"checkpoint folder {config.trainer.checkpoint.directory}: of a training on joined examples, expected one "
            "that joins itself: the ledger of smes join is in its report"
        )
    known = [] if marks is None else read_marks(marks)
    with closing(open_event_log(config.event_log)) as log, progress("audit", None) as advance:
        result = recount(
            log,
            config.schema_file().schema,
            state.arrays,
            old_schemas=[*(change.was for change in declared_changes(config)), *state.schemas.known()],
            trained=state.trained,
            not_finite=state.not_finite,
            marks=known,
            on_progress=None if as_json else lambda records: advance(records, "records read"),
        )
    about = {"lineage": state.lineage, "step": state.step}
    if as_json:
        console.print_json(json.dumps({"checkpoint": about, **result.to_dict()}))
    else:
        _print(result, about)
    if not result.balanced:
        for each in result.imbalances:
            errors.print(f"does not balance: {each}", style="bold red", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_CHECK_FAILED)
    if marks is not None:
        write_marks(marks, [*known, *result.marks])


def _print(result: "AuditResult", about: dict[str, Any]) -> None:
    table = Table(box=None)
    table.title = f"lineage {about['lineage']}, step {number(about['step'])}"
    table.title_justify = "left"
    table.add_column("partition", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for each in result.partitions:
        table.add_row(f"{each.topic}/{each.partition}", *(number(getattr(each, name)) for name in _COLUMNS))
    for topic in dict.fromkeys(each.topic for each in result.partitions):
        of_topic = [each for each in result.partitions if each.topic == topic]
        sums = [sum(getattr(each, name) for each in of_topic) for name in _COLUMNS]
        table.add_row(f"{topic}, all", *map(number, sums), style="bold")
    console.print(table)
    letters = ", ".join(f"{count:,} {code}" for code, count in result.letters.items()) or "none"
    console.print(f"dead letters, in events: {letters}; letters replayed: {result.letters_replayed:,}", highlight=False)
    for note in result.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if result.balanced:
        console.print(f"balanced: {result.equations:,} equations hold", highlight=False)
