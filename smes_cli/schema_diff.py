"""``smes schema diff``: what changes from one schema to the next, and what of a checkpoint would go on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smes.errors import CheckpointError
from smes_cli.command_line import EXIT_CHECK_FAILED, config_of
from smes_cli.console import console, errors

if TYPE_CHECKING:
    from smes.schema_change import SchemaChange
    from smes_cli.config import Config


def diff(
    context: typer.Context,
    old: Annotated[str, typer.Argument(help="The schema file before, or kuairand or synthetic.")],
    new: Annotated[str, typer.Argument(help="The schema file after; its section renamed says what has a new name.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a trainer's checkpoints: say, too, what of the newest one cannot be carried over."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What differs between two schemas. Changes nothing; exits with 3 if something cannot be carried over."""
    from smes.schema_change import SchemaChange
    from smes_cli.schema_changes import schema_file_named

    config = config_of(context, new)
    was, now = schema_file_named(config, old), config.schema_file()
    change = SchemaChange(was.schema, now.schema, now.renamed)
    problems, anew, about = list(change.problems), list[str](), dict[str, Any]()
    if checkpoint is not None:
        more, anew, about = _of_checkpoint(config, change, checkpoint)
        problems = list(dict.fromkeys([*problems, *more]))
    if as_json:
        console.print_json(json.dumps(_values(change, problems, anew, about)))
    else:
        lines = [line for line in change.describe() if not line.startswith("cannot be")]
        lines += [f"begins anew: {what}" for what in anew]
        for line in lines or ["no difference" if change.is_none else "no difference but the order"]:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        for problem in problems:
            errors.print(f"cannot be carried over: {problem}", style="bold red", highlight=False, soft_wrap=True)
        if about:
            console.print(
                f"checkpoint of step {about['step']:,}, lineage {about['lineage']}: "
                + ("cannot be carried over" if problems else "smes train --change-schema goes on from it"),
                highlight=False,
                soft_wrap=True,
            )
    if problems:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _values(change: "SchemaChange", problems: list[str], anew: list[str], about: dict[str, Any]) -> dict[str, Any]:
    return {
        "was": change.was.hash,
        "now": change.now.hash,
        "carried": list(change.carried),
        "new": list(change.new),
        "dropped": list(change.dropped),
        "changed": list(change.changed),
        "problems": problems,
        "problems_of_events": list(change.problems_of_events),
        **({"checkpoint": {**about, "begins_anew": anew}} if about else {}),
    }


def _of_checkpoint(
    config: "Config", change: "SchemaChange", folder: Path
) -> tuple[list[str], list[str], dict[str, Any]]:
    """What of the newest checkpoint of a folder cannot be carried over, what begins anew, and which one it is.

    Raises:
        CheckpointError: There is none.
        ValueError: It is of another schema than the old one.
    """
    from smes_cli.schema_changes import carry_over_of
    from trainer.checkpoints import CheckpointDirectory

    found = None
    if folder.is_dir():
        found = CheckpointDirectory(folder, keep=1).newest(
            schema=change.now, model=config.model.to_dict(), only=("stream.", "gate.marks"), any_schema=True
        )
    if found is None:
        raise CheckpointError(f"--checkpoint {folder}: no checkpoint, expected the folder of a trainer's checkpoints")
    if found.schema_hash != change.was.hash:
        raise ValueError(
            f"--checkpoint {folder}: of schema {found.schema_hash}, expected the old schema's, {change.was.hash}"
        )
    how = carry_over_of(config, change)
    return how.problems(found), how.begins_anew(found), {"step": found.step, "lineage": found.lineage}
