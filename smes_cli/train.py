"""``smes train``: event log → join → progressive evaluation → training → snapshots and checkpoints."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.live import Live

from feature_store.snapshots import SnapshotStore
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
from trainer.loop import Trainer
from trainer.publisher import Publisher
from trainer.report import ledger_line, training_report
from trainer.schedule import Flags, Schedule

_logger = logging.getLogger(__name__)
_TABLE_EVERY_S = 1.0
_LINE_EVERY_S = 5.0


def run_train(
    config: Config, *, report: Path | None, drain: bool, skip_lost: bool, should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Train until told to stop; the report, also written to ``report``.

    Args:
        config: What to train, from where, to where.
        report: Where to write the report, if anywhere.
        drain: When told to stop, first train on everything that is in the log by then.
        skip_lost: Go on at the oldest record kept where the log no longer holds the checkpoint's position.
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
        for source, (before, now) in (stream.skip_lost() if skip_lost else {}).items():
            _logger.error("%s partition %d: going on at %d, not %d", source.topic, source.partition, now, before)
        warm_up(config, schema)

        def publisher(lineage: str) -> Publisher:
            return Publisher(store, schema, config.model.to_dict(), lineage, now_ms=wall_clock_ms)

        trainer.publish_to(publisher, store.current)
        started_s, trained_before = time.monotonic(), trainer.trained
        intervals_s = {
            "snapshot": config.trainer.snapshot_interval_s,
            "checkpoint": config.trainer.checkpoint.interval_s,
        }
        with Schedule(flags, intervals_s), _live(started_s, trained_before) as on_progress:
            console.print("training: waiting for events", highlight=False)
            trainer.run(should_stop, drain=drain, on_progress=on_progress)
        result = training_report(
            trainer, seconds=time.monotonic() - started_s, trained=trainer.trained - trained_before
        )
        result["snapshots"].update(trainer.published())
    write_report(result, report)
    return result


def _restored_trainer(config: Config, schema: Schema, stream: ExampleStream, flags: Flags) -> Trainer:
    """A trainer that goes on from the newest checkpoint, if there is one."""
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
def _live(started_s: float, trained_before: int) -> Iterator[Callable[[Trainer], None]]:
    """A table that follows the training on a terminal, a line every few seconds otherwise."""
    live = Live(console=console, auto_refresh=False, transient=True) if _is_live() else None
    every_s = _TABLE_EVERY_S if live else _LINE_EVERY_S
    last_s = time.monotonic()

    def show(trainer: Trainer) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s < every_s:
            return
        last_s = now_s
        rate = (trainer.trained - trained_before) / (now_s - started_s)
        head = f"step {trainer.learner.step_number:,} · {trainer.trained:,} trained ({rate:,.0f}/s) · " + ledger_line(
            trainer.stream.assembler.ledger()
        )
        tasks = trainer.evaluation.report()
        if live:
            table = task_table({name: {k: getattr(m, k) for k in _COLUMNS} for name, m in tasks.items()})
            table.caption = head
            live.update(table, refresh=True)
        else:
            aucs = " ".join(f"{name} {number(m.auc, 3)}" for name, m in tasks.items() if m.auc is not None)
            console.print(f"{head} · AUC {aucs}", highlight=False, soft_wrap=True)

    if live is None:
        yield show
        return
    with live:
        yield show


_COLUMNS = ("positives", "auc", "gauc_windowed", "ne", "ece")


def _is_live() -> bool:
    return console.is_terminal and not console.quiet
