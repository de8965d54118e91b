"""``smes score``: the scores of one version for the rows of a file, as a file."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smes.errors import LogError, SmesError
from smes_cli.command_line import SchemaName, config_of, stop_signals
from smes_cli.console import console, number, progress
from smes_cli.snapshot_places import CheckpointOption, Lineage, VersionOption

if TYPE_CHECKING:
    from simulators.logs.rows import RowReader
    from smes_cli.frozen_version import FrozenVersion

_ROWS = 8192
_PREFIX = "score_"


def score(
    context: typer.Context,
    rows: Annotated[Path, typer.Argument(help="A file, or a folder, as the schema file's log section describes it.")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write.")],
    version: VersionOption = None,
    lineage: Lineage = None,
    checkpoint: CheckpointOption = None,
    schema: SchemaName = None,
) -> None:
    """Score every row of a file with one version, into a Parquet file with the same rows. Labels are not read."""
    if out.suffix != ".parquet":
        raise ValueError(f"--out {out}: expected a file that ends in .parquet")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: expected a file in a folder that exists")
    config = config_of(context, schema)
    schema_file = config.schema_file(rows)  # a mistake in it is reported before torch is imported
    from simulators.logs.rows import open_rows
    from smes_cli.frozen_version import frozen_version

    frozen = frozen_version(config, version, lineage, checkpoint, rows)
    frozen.require_schema(schema_file.schema)
    with open_rows(rows, schema_file) as reader, stop_signals() as should_stop:
        if reader.schema.history is not None:
            built = f"{reader.schema.history.items} and {reader.schema.history.outcomes}"
            console.print(f"the history ({built}) is empty in every row: a file does not carry it", highlight=False)
        scored = write_scores(reader, frozen, out, should_stop)
        unusable = dict(reader.rejected)
    console.print(f"{scored:,} rows scored by {frozen.source} into {out}", highlight=False, soft_wrap=True)
    for reason, count in unusable.items():
        console.print(f"{number(count)} rows without a score: {reason}", highlight=False, soft_wrap=True)


def write_scores(reader: "RowReader", frozen: "FrozenVersion", out: Path, should_stop: Callable[[], bool]) -> int:
    """Score rows block by block into a file, which has its name when it is whole.

    The file has the columns that tell rows apart, and ``score_<task>`` for each task: a probability, or a value in the
    label's unit; null in a row that is not usable.

    Args:
        reader: The rows.
        frozen: Scores.
        out: The file.
        should_stop: Asked between two blocks.

    Returns:
        Rows with scores.

    Raises:
        LogError: No row is usable, or the files cannot be read.
        SmesError: The file cannot be written, or a stop was asked for. Nothing is left behind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    model, tasks = frozen.serving_model(), frozen.schema.tasks
    partial, scored, done = out.with_suffix(".partial"), 0, 0
    with contextlib.ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        advance = stack.enter_context(progress("score", reader.total))
        writer: Any = None
        try:
            for block in reader.row_blocks(_ROWS):
                if should_stop():
                    raise SmesError(f"stopped after {done:,} of {reader.total:,} rows: {out} was not written")
                rows = block.impressions
                values = model.score(rows.ids, rows.numerics, rows.event_time_ms)
                table = block.names
                for t, task in enumerate(tasks):
                    column = pa.array(values[:, t], pa.float32(), mask=~block.usable)
                    table = table.append_column(f"{_PREFIX}{task.name}", column)
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(partial, table.schema))
                writer.write_table(table)
                scored, done = scored + int(block.usable.sum()), done + len(rows)
                advance(done)
        except OSError as error:
            raise SmesError(f"{out}: cannot be written: {error.strerror or error}") from error
        if not scored:
            raise LogError(f"{reader.spec.user_id}: no row has a user, an item and a time, expected at least one")
        writer.close()
        partial.replace(out)
    return scored
