"""Changes of the schema: what the configuration and a command line say of them, and the checkpoint carried over."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from smes.errors import CheckpointError
from smes.schema import Schema
from smes.schema_change import Renames, SchemaChange
from smes_cli.config import Config
from smes_cli.console import console
from smes_io.schema_file import SchemaFile

if TYPE_CHECKING:
    from trainer.carry_over import CarryOver
    from trainer.checkpoint_file import Checkpoint


def schema_file_named(config: Config, name: str) -> SchemaFile:
    """A schema file by its path, or a built-in one by its name.

    Raises:
        ValueError: It cannot be read, or is wrong.
    """
    return replace(config, schema=name).schema_file()


def declared_changes(config: Config) -> tuple[SchemaChange, ...]:
    """The changes from the schemas of ``stream.old_schemas`` to the present one.

    Raises:
        ValueError: A file cannot be read, or its events cannot be read as events of the present schema.
    """
    now = config.schema_file()
    olds = {name: schema_file_named(config, name) for name in config.stream.old_schemas}
    changes = []
    for name, old in olds.items():
        if old.schema.hash == now.schema.hash:
            continue
        earlier = [other.renamed for other in olds.values() if other is not old]
        renamed = now.renamed.over(earlier, old.schema).between(old.schema, now.schema)
        change = SchemaChange(old.schema, now.schema, renamed)
        if problems := change.problems_of_events:
            raise ValueError(f"stream.old_schemas: {name}: {'; '.join(problems)}")
        changes.append(change)
    return tuple(changes)


def change_to_present(config: Config, was: Schema) -> SchemaChange:
    """The change from a checkpoint's schema to the present one.

    Raises:
        ValueError: A schema file cannot be read, or is wrong.
    """
    now = config.schema_file()
    earlier = [schema_file_named(config, name).renamed for name in config.stream.old_schemas]
    given, known = now.renamed, now.renamed.over(earlier, was).between(was, now.schema)
    # Those of the file that lead nowhere stay, to be told as problems.
    renamed = Renames({**given.features, **known.features}, {**given.tasks, **known.tasks})
    return SchemaChange(was, now.schema, renamed)


def carry_over_of(config: Config, change: SchemaChange) -> "CarryOver":
    """How a checkpoint is carried over with this configuration."""
    from trainer.carry_over import CarryOver

    return CarryOver(
        change=change,
        model=config.model,
        optimizer=config.optimizer,
        rows=config.rows,
        seed=config.trainer.seed,
        join=config.stream.join,
        gate=config.trainer.gate.enabled,
    )


def carrying_over(config: Config) -> Callable[["Checkpoint"], "Checkpoint"]:
    """Carries a checkpoint of another schema over to the present one; says before what that means.

    The function raises :class:`smes.errors.CheckpointError` if something cannot be carried over.
    """

    def carry_over(checkpoint: "Checkpoint") -> "Checkpoint":
        change = change_to_present(config, Schema.from_dict(checkpoint.schema))
        how = carry_over_of(config, change)
        if problems := how.problems(checkpoint):
            raise CheckpointError(
                f"--change-schema: the checkpoint of step {checkpoint.step} stays as it is; cannot be carried over: "
                f"{'; '.join(problems)}"
            )
        console.print(
            f"the schema changes from {change.was.hash} to {change.now.hash}; carrying over the checkpoint of step "
            f"{checkpoint.step} of lineage {checkpoint.lineage} as step {checkpoint.step + 1}",
            highlight=False,
            soft_wrap=True,
        )
        for line in (*change.describe(), *(f"begins anew: {what}" for what in how.begins_anew(checkpoint))):
            console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
        return how(checkpoint)

    return carry_over
