"""What a training shows of itself: metrics and health over HTTP, and its metrics over time in files."""

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from smes_cli.config import Config
from smes_cli.console import console
from smes_cli.schema_changes import declared_changes
from smes_io.clock import wall_clock_ms
from stream.codec.codec import decode
from stream.joined.records import newest_time_ms
from stream.log.open_log import open_event_log
from trainer.config import HistoryConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.experts_over_time import ExpertsOverTime
from trainer.history import HistoryFiles, read_history, write_end
from trainer.history_line import line_of
from trainer.http import TrainerServer
from trainer.lineages import root_of
from trainer.log_end import LogEnd
from trainer.loop import Trainer
from trainer.recent_lines import MOST_LINES, RecentLines
from trainer.report import TrainingReport
from trainer.series import registry_of
from trainer.stats import TrainerStats
from trainer.stretches import Stretch, Stretches
from trainer.telemetry import Watch, experts_of, problems_of


def build_stretches(config: Config, evaluation: ProgressiveEvaluation) -> Stretches | None:
    """The metrics over time of an evaluation, if anybody is to see them."""
    trainer = config.trainer
    if trainer.http.port is None and trainer.history.directory is None:
        return None
    history = trainer.history
    return Stretches(evaluation, every_examples=history.every_examples, every_s=history.every_s)


def open_server(config: Config, stack: ExitStack) -> TrainerServer | None:
    """The server of metrics and health, if one is configured: live, and not ready."""
    if config.trainer.http.port is None:
        return None
    server = TrainerServer(config.trainer.http)
    server.start()
    stack.callback(server.stop)
    console.print(f"metrics: http://{config.trainer.http.host}:{server.port}/metrics", highlight=False)
    return server


def show(
    config: Config,
    trainer: Trainer,
    stretches: Stretches | None,
    server: TrainerServer | None,
    report: Callable[[], TrainingReport],
    stack: ExitStack,
) -> Watch | None:
    """Begin to show a trainer that is about to run: its checkpoint, if any, is restored, its lineage is known.

    Returns:
        Who copies its figures; None where nobody can ask for them.
    """
    if stretches is None:
        return None
    history, log_end, watch = config.trainer.history, None, None
    if server is not None:
        watch = Watch(trainer, stretches, report=report)
        log_end = _log_end(config, watch)
        log_end.start()
        stack.callback(log_end.stop)
    lines = RecentLines()
    if history.directory is not None:
        lines = write_history(history, history.directory, trainer, stretches, log_end)
    elif server is not None:
        _tell(trainer, stretches, log_end, lines.add)
    if server is not None and watch is not None:
        trainer.observe(watch)
        stats = TrainerStats(watch, log_end, lines, trainer.lineage)
        server.show(registry_of(watch, log_end), partial(problems_of, watch, log_end), stats)
    return watch


def write_history(
    config: HistoryConfig, directory: Path, trainer: Trainer, stretches: Stretches, log_end: LogEnd | None = None
) -> RecentLines:
    """Write a line of every stretch of a trainer from now on.

    Returns:
        The newest lines of this run, those from now on included.

    Raises:
        SmesError: The folder cannot be used.
    """
    files = HistoryFiles(directory, config.keep)
    files.begin(trainer.lineage, trainer.learner.step_number, stretches.number)
    root = root_of(trainer.lineage)
    before = deque((line for line in read_history(directory) if root_of(line["lineage"]) == root), maxlen=MOST_LINES)
    lines = RecentLines(before)
    _tell(trainer, stretches, log_end, files.append, lines.add)
    return lines


def end_history(directory: Path, trainer: Trainer, report: dict[str, Any]) -> None:
    """Write what a run leaves that has ended: its report, and its experts over time.

    Raises:
        SmesError: A file cannot be written.
    """
    learner, segments = trainer.learner, trainer.experts.history.segments
    experts = ExpertsOverTime([task.name for task in learner.schema.tasks], learner.expert_limits)
    first_step = learner.step_number - sum(segment.steps for segment in segments)
    write_end(directory, report, experts.values(segments, first_step))


def _tell(
    trainer: Trainer, stretches: Stretches, log_end: LogEnd | None, *tell: Callable[[dict[str, Any]], None]
) -> None:
    """Call with a line of every stretch from now on."""

    def listen(stretch: Stretch) -> None:
        line = line_of(
            stretch,
            lineage=trainer.lineage,
            wall_ms=wall_clock_ms(),
            experts=experts_of(trainer),
            rows=trainer.row_counts,
            lag=None if log_end is None else log_end.lag,
        )
        for each in tell:
            each(line)

    stretches.listen(listen)


def _log_end(config: Config, watch: Watch) -> LogEnd:
    schema, changes = config.schema_file().schema, declared_changes(config)
    return LogEnd(
        lambda: open_event_log(config.event_log),
        lambda records: decode(records, schema, changes=changes),
        watch.positions,
        time_of_examples=lambda record: newest_time_ms(record, schema, changes),
    )
