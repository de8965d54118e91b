"""``smes train``: event log → join → progressive evaluation → training → snapshots and checkpoints."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.live import Live

from feature_store.snapshots import SnapshotStore
from smes.events import ExampleBlock
from smes.model.devices import keep_freed_memory
from smes.schema import Schema
from smes_cli.building import build_evaluation, build_learner, warm_up
from smes_cli.config import Config
from smes_cli.console import console, number, task_table, write_report
from smes_io.clock import wall_clock_ms
from smes_io.redis_client import connect
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.checkpoints import CheckpointDirectory
from trainer.loop import CHECKPOINT, SNAPSHOT, Trainer
from trainer.observers import Observer, StepFigures
from trainer.publisher import Publisher
from trainer.report import TrainingReport, ledger_line
from trainer.run_report import task_figures, training_report
from trainer.schedule import Flags, Schedule

_logger = logging.getLogger(__name__)
_TABLE_EVERY_S = 1.0
_LINE_EVERY_S = 5.0


def run_train(
    config: Config, *, report: Path | None, drain: bool, skip_lost: bool, should_stop: Callable[[], bool]
) -> TrainingReport:
    """Train until ``should_stop``; returns the report, which is also written to ``report``.

    Args:
        config: What to train, from where, to where.
        report: Where to write the report, if anywhere.
        drain: Before stopping, train on everything that is in the log by then.
        skip_lost: If the log no longer holds the checkpoint's position, continue at the oldest record that it has.
        should_stop: Asked between two steps.

    Raises:
        EventLogUnavailable, FeatureStoreUnavailable: Not reachable within the configured wait.
        SmesError, ValueError: As the components raise them.
    """
    keep_freed_memory()
    schema = config.schema_file().schema
    with ExitStack() as stack:
        log = open_event_log(config.event_log)
        stack.callback(log.close)
        for topic in (IMPRESSIONS, FEEDBACK):
            log.ensure_topic(topic, config.event_log.partitions)
        redis_client = connect(config.feature_store.redis_url, config.feature_store.timeout_s)
        stack.callback(redis_client.close)
        store = SnapshotStore(redis_client, config.feature_store.namespace, config.feature_store.snapshots)
        flags = Flags()
        stream = ExampleStream(schema, config.stream, log, DeadLetterWriter(log))
        trainer = _restored_trainer(config, schema, stream, flags)
        for skipped in (stream.skip_lost() if skip_lost else {}).values():
            _logger.error("%s", skipped)
        warm_up(config, schema)

        def publisher(lineage: str) -> Publisher:
            return Publisher(store, schema, config.model.to_dict(), lineage, now_ms=wall_clock_ms)

        trainer.publish_to(publisher, store.current)
        started_s, trained_before = time.monotonic(), trainer.trained
        intervals_s = {
            SNAPSHOT: config.trainer.snapshot_interval_s,
            CHECKPOINT: config.trainer.checkpoint.interval_s,
        }
        with Schedule(flags, intervals_s), _progress(trainer) as progress:
            trainer.observe(progress)
            console.print("training: waiting for events", highlight=False)
            trainer.run(should_stop, drain=drain)
        result = training_report(
            trainer, seconds=time.monotonic() - started_s, trained=trainer.trained - trained_before
        )
    write_report(result.to_dict(), report)
    return result


def _restored_trainer(config: Config, schema: Schema, stream: ExampleStream, flags: Flags) -> Trainer:
    """A trainer, restored from the newest checkpoint if there is one."""
    learner = build_learner(config, schema)
    directory = config.trainer.checkpoint.directory
    checkpoints = CheckpointDirectory(directory, config.trainer.checkpoint.keep) if directory else None
    if checkpoints is None:
        _logger.warning("trainer.checkpoint.directory is not set: a restart will begin anew")
    trainer = Trainer(learner, stream, build_evaluation(config, learner), flags, checkpoints=checkpoints)
    step = trainer.restore()
    if step is not None:
        console.print(f"going on from the checkpoint of step {step} of lineage {trainer.lineage}", highlight=False)
    return trainer


@contextmanager
def _progress(trainer: Trainer) -> Iterator["_Progress"]:
    """An observer that shows how the training goes: a table on a terminal, a line every few seconds otherwise."""
    if not console.is_terminal or console.quiet:
        yield _Progress(trainer, None)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield _Progress(trainer, live)


class _Progress(Observer):
    """Shows the counts and metrics so far, at most once in a while."""

    def __init__(self, trainer: Trainer, live: Live | None) -> None:
        self._trainer, self._live = trainer, live
        self._every_s = _TABLE_EVERY_S if live else _LINE_EVERY_S
        self._started_s = self._last_s = time.monotonic()
        self._trained_before = trainer.trained

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Show if it is time to."""
        self._show_if_due()

    def after_read(self) -> None:
        """Show if it is time to: reads change the counts, too."""
        self._show_if_due()

    def _show_if_due(self) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s < self._every_s:
            return
        self._last_s = now_s
        trainer = self._trainer
        rate = (trainer.trained - self._trained_before) / (now_s - self._started_s)
        head = (
            f"step {trainer.learner.step_number:,} · {trainer.trained:,} trained ({rate:,.0f}/s) · "
            f"{ledger_line(trainer.stream.ledger())}"
        )
        metrics = trainer.evaluation.report()
        if self._live:
            table = task_table({name: asdict(task) for name, task in task_figures(metrics).items()})
            table.caption = head
            self._live.update(table, refresh=True)
            return
        aucs = " ".join(f"{name} {number(task.auc, 3)}" for name, task in metrics.items() if task.auc is not None)
        console.print(f"{head} · AUC {aucs}", highlight=False, soft_wrap=True)
