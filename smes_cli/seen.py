"""What a training shows of itself: metrics and health over HTTP, and its metrics over time in files."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from smes_cli.config import Config
from smes_cli.console import console
from smes_cli.schema_changes import declared_changes
from smes_io.clock import wall_clock_ms
from stream.codec.codec import decode
from stream.log.open_log import open_event_log
from trainer.config import HistoryConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.history import HistoryFiles, line_of
from trainer.http import TrainerServer
from trainer.log_end import LogEnd
from trainer.loop import Trainer
from trainer.series import registry_of
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
    config: Config, trainer: Trainer, stretches: Stretches | None, server: TrainerServer | None, stack: ExitStack
) -> None:
    """Begin to show a trainer that is about to run: its checkpoint, if any, is restored, its lineage is known."""
    if stretches is None:
        return
    watch, log_end = Watch(trainer, stretches), None
    if server is not None:
        log_end = _log_end(config, watch)
        log_end.start()
        stack.callback(log_end.stop)
    if config.trainer.history.directory is not None:
        write_history(config.trainer.history, config.trainer.history.directory, trainer, stretches, log_end)
    if server is not None:
        trainer.observe(watch)
        server.show(registry_of(watch, log_end), partial(problems_of, watch, log_end))


def write_history(
    config: HistoryConfig, directory: Path, trainer: Trainer, stretches: Stretches, log_end: LogEnd | None = None
) -> None:
    """Write a line of every stretch of a trainer from now on.

    Raises:
        SmesError: The folder cannot be used.
    """
    files = HistoryFiles(directory, config.keep)
    files.begin(trainer.lineage, trainer.learner.step_number, stretches.number)

    def write(stretch: Stretch) -> None:
        files.append(
            line_of(
                stretch,
                lineage=trainer.lineage,
                wall_ms=wall_clock_ms(),
                experts=experts_of(trainer),
                rows=trainer.learner.row_counts,
                lag=None if log_end is None else log_end.lag,
            )
        )

    stretches.listen(write)


def _log_end(config: Config, watch: Watch) -> LogEnd:
    schema, changes = config.schema_file().schema, declared_changes(config)
    return LogEnd(
        lambda: open_event_log(config.event_log),
        lambda records: decode(records, schema, changes=changes),
        watch.positions,
    )
