"""``smes evaluate``: the metrics of one version on a log, without training on it."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from smes_cli.command_line import (
    Limit,
    LogPath,
    MaxRejected,
    ReportPath,
    SchemaName,
    Seed,
    config_of,
    stop_signals,
)
from smes_cli.console import console, progress, write_report
from smes_cli.snapshot_places import CheckpointOption, Lineage, VersionOption

if TYPE_CHECKING:
    from smes_cli.config import Config
    from smes_cli.frozen_version import FrozenVersion

_ROWS = 4096


def evaluate(
    context: typer.Context,
    log: LogPath,
    version: VersionOption = None,
    lineage: Lineage = None,
    checkpoint: CheckpointOption = None,
    schema: SchemaName = None,
    limit: Limit = None,
    max_rejected: MaxRejected = None,
    seed: Seed = None,
    report: ReportPath = None,
) -> None:
    """Score a log with one version and print the metrics of every task. Trains nothing."""
    config = config_of(context, schema)
    config.schema_file(log)  # a mistake in it is reported before torch is imported
    from smes_cli.frozen_version import frozen_version
    from smes_cli.log_tables import print_ledger
    from smes_cli.task_tables import headline_lines, task_tables

    frozen = frozen_version(config, version, lineage, checkpoint, log)
    with stop_signals() as should_stop:
        figures, ledger = run_evaluation(
            config,
            frozen,
            log,
            limit=limit,
            max_rejected=max_rejected,
            seed=config.replay.seed if seed is None else seed,
            should_stop=should_stop,
        )
    write_report(figures, report)
    scored = f"{frozen.source}: {figures['impressions']:,} impressions scored, none trained on"
    console.print(scored, highlight=False, soft_wrap=True)
    for table in task_tables(figures["tasks"]):
        table.title = None
        console.print(table)
        console.print()
    for line in headline_lines(figures["headline"]):
        console.print(line, highlight=False)
    print_ledger(ledger)


def run_evaluation(
    config: "Config",
    frozen: "FrozenVersion",
    log: Path,
    *,
    limit: int | None,
    max_rejected: float | None,
    seed: int,
    should_stop: Callable[[], bool],
) -> tuple[dict[str, Any], Any]:
    """Score every impression of a log, and compare with its final labels.

    Args:
        config: Its join and evaluation are used; every task waits for its window.
        frozen: The weights.
        log: A folder or file; see :func:`simulators.logs.reader.open_log`.
        limit, max_rejected, seed: As for a backtest.
        should_stop: Asked between two reads; a stopped evaluation tells what it has scored.

    Returns:
        The report, and the log's ledger (:class:`simulators.logs.ledger.LogLedger`).

    Raises:
        SchemaMismatch: The weights are of another schema than the log's schema file.
        LogError: The log cannot be read as its schema file says.
    """
    from simulators.logs.reader import open_log
    from simulators.merge import replay_blocks
    from stream.block_stream import BlockStream
    from stream.config import MiniBatchConfig
    from trainer.frozen_evaluation import FrozenEvaluation
    from trainer.run_report import task_figures
    from trainer.task_figures import headline

    schema_file = config.schema_file(log)
    frozen.require_schema(schema_file.schema)
    with open_log(log, schema_file, limit=limit, max_rejected=max_rejected) as reader:
        join = replace(config.stream.join, wait={"default": "window"})  # final labels, each impression once
        blocks = replay_blocks(reader, seed)
        stream = BlockStream(frozen.schema, join, MiniBatchConfig(size=_ROWS, max_wait_s=None), blocks)
        evaluation = FrozenEvaluation(frozen.serving_model(), frozen.schema, config.trainer.evaluation)
        with progress("evaluate", reader.total) as advance:
            while not should_stop() and not (stream.ended and stream.upcoming() is None):
                if (batch := stream.next_batch()) is None:
                    stream.poll(0.0)
                    continue
                evaluation.add(batch)
                advance(evaluation.impressions)
        tasks = task_figures(evaluation.report())
        figures = frozen.described() | {
            "impressions": evaluation.impressions,
            "headline": asdict(headline(tasks)),
            "tasks": {name: asdict(task) for name, task in tasks.items()},
            "log": reader.ledger.to_dict(),
        }
        return figures, reader.ledger
