"""``smes train``: event log → join → progressive evaluation → training → snapshots and checkpoints."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from feature_store.objects import Objects
from feature_store.signing import Signer
from feature_store.snapshots import SnapshotStore
from smes.errors import SmesError
from smes.model.devices import keep_freed_memory
from smes.world import ALONE, World
from smes_cli.building import build_evaluation, build_gate, build_learner, warm_up
from smes_cli.config import Config
from smes_cli.console import console, write_report
from smes_cli.primed_start import PrimedStart, begin_primed
from smes_cli.schema_changes import carrying_over, declared_changes
from smes_cli.seen import build_stretches, end_history, open_server, show
from smes_cli.starting_point import WithoutCheckpoint, find_starting_point
from smes_cli.stored_features import open_stored_features
from smes_cli.train_examples import open_joined
from smes_cli.train_progress import show_progress
from smes_cli.train_ranks import evaluation_of_all, rank_trainer, share_of_batches, shared_checkpoints
from smes_io.clock import wall_clock_ms
from stream.batch_journal import BatchJournal, name_of
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.joined.joined_stream import JoinedStream
from stream.log.open_log import open_event_log
from stream.sources import Share
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.checkpoints import CheckpointDirectory
from trainer.lease import LeaseKeeper
from trainer.loop import CHECKPOINT, SNAPSHOT, Trainer
from trainer.other_ranks import OtherRanks
from trainer.part_uploader import PartUploader
from trainer.publisher import Publisher
from trainer.rank_loop import RankTrainer
from trainer.report import TrainingReport
from trainer.run_report import report_so_far, training_report
from trainer.schedule import Flags, Schedule
from trainer.telemetry import Watch
from trainer.waits import WaitingLog, Waits

_logger = logging.getLogger(__name__)


def run_train(
    config: Config,
    *,
    report: Path | None,
    drain: bool,
    skip_lost: bool,
    should_stop: Callable[[], bool],
    stop_event: threading.Event | None = None,
    flush: bool = False,
    without_checkpoint: WithoutCheckpoint | None = None,
    primed: PrimedStart | None = None,
    change_schema: bool = False,
    world: World = ALONE,
    examples: bool = False,
) -> TrainingReport | None:
    """Train until ``should_stop``; returns the report, which is also written to ``report``.

    Of several ranks, all call this, and rank 0 has the report; the others return None.

    Args:
        config: What to train, from where, to where.
        report: Where to write the report, if anywhere.
        drain: Before stopping, train on everything that is in the log by then.
        skip_lost: If the log no longer holds the checkpoint's position, continue at the oldest record that it has.
        should_stop: Asked between two steps.
        stop_event: Set when a stop is asked for; waits inside the event log hear it.
        flush: Drain, then train on what still waits for feedback, as at the end of a finite log.
        without_checkpoint: What to do where there is no checkpoint but a model is in service; None: stop and ask.
        change_schema: Carry a checkpoint of another schema over to the configured one.
        primed: Begin where a log in files has brought the training; None: at the newest checkpoint.
        world: The ranks that train together.
        examples: Read joined examples, and join nothing.

    Raises:
        EventLogUnavailable, FeatureStoreUnavailable: Not reachable within the configured wait.
        LeaseHeld, CheckpointError: Another trainer publishes in the namespace, or uses the folder of checkpoints.
        Stopped: A stop was asked for before the training began.
        RankLost: Another rank has gone.
        SmesError, ValueError: As the components raise them.
    """
    keep_freed_memory()
    drain = drain or flush
    schema = config.schema_file().schema
    several, is_first = world.size > 1, world.rank == 0
    with ExitStack() as stack:
        server = open_server(config, stack) if is_first else None
        checkpoints = _checkpoints(config, None if several else stack)
        shared = shared_checkpoints(checkpoints, world, stack) if several else None
        if primed is not None and checkpoints is not None and not checkpoints.is_empty:
            raise ValueError(
                f"--from {primed.folder}: {checkpoints.directory} (trainer.checkpoint.directory) has a checkpoint "
                "already, expected none; without --from, the training goes on from it"
            )
        # With a drain, a stop is a wish to train on what is there: it does not end a wait.
        waits = Waits(_never if drain else should_stop)
        log = _event_log(config, waits, stack, world)
        log.set_stop(None if drain else stop_event)
        store = _store(config, waits, stack)
        holder = f"process {os.getpid()} on {socket.gethostname()}, rank 0 of {world.size}" if several else None
        lease = LeaseKeeper(store, config.trainer.lease_s, should_stop=should_stop, holder=holder)
        if is_first:
            stack.enter_context(lease)
        letters = DeadLetterWriter(log)
        journal, stream_stop = _journal(config, checkpoints, world), None if drain else stop_event
        stream: ExampleStream | JoinedStream
        if examples:
            stream = open_joined(config, log, letters, journal)
        else:
            stream = ExampleStream(
                schema,
                share_of_batches(config.stream, world),
                log,
                letters,
                changes=declared_changes(config),
                features=open_stored_features(config, config.schema_file(), waits, stream_stop, stack),
                journal=journal,
                share=Share(world.rank, world.size),
            )
        flags = Flags()
        learner = build_learner(config, schema, world=world)
        evaluation = evaluation_of_all(config, schema) if several else build_evaluation(config, learner)
        stretches = build_stretches(config, evaluation) if is_first else None
        renamed = config.schema_file().renamed.features
        trainer: Trainer
        if several:
            assert isinstance(stream, ExampleStream), "several ranks join themselves"
            trainer = rank_trainer(
                config,
                world,
                learner,
                stream,
                flags,
                evaluation=evaluation,
                checkpoints=shared,
                stretches=stretches,
                letters=letters,
                open_part=lambda: PartUploader(
                    store, schema, config.model.to_dict(), world.rank, world.size, renamed=renamed
                ),
            )
        else:
            trainer = Trainer(
                learner,
                stream,
                evaluation,
                flags,
                checkpoints=checkpoints,
                max_failed_steps=config.trainer.max_failed_steps,
                dead_letters=letters.write,
                gated=build_gate(config, learner),
                stretches=stretches,
            )
        otherwise = without_checkpoint or WithoutCheckpoint()
        if primed is None:
            carried_over = carrying_over(config) if change_schema else None
            served = find_starting_point(trainer, stream, store, otherwise, carried_over)
        else:
            served = begin_primed(primed, config, trainer, log, store, otherwise)
        skipped = stream.skip_lost().values() if skip_lost else ()
        for each in skipped:
            _logger.error("%s", each)
        if isinstance(trainer, RankTrainer):
            trainer.note_skipped(bool(skipped))
        warm_up(config, schema)

        def publisher(lineage: str) -> Publisher:
            return Publisher(
                store,
                schema,
                config.model.to_dict(),
                lineage,
                now_ms=wall_clock_ms,
                lease=lease,
                carried_from=trainer.schemas.without(schema.hash),
                renamed=renamed,
                others=OtherRanks(world.size - 1, config.feature_store.snapshots.upload_ttl_s) if several else None,
            )

        trainer.publish_to(
            publisher,
            served.manifest,
            listed=store.list(),
            unreadable=served.problem is not None,
            steps_before_replacing=config.trainer.steps_before_replacing,
        )
        if not is_first:
            waits.meanwhile = _duties(trainer, None, None, should_stop)
            trainer.run(should_stop, drain=drain, flush=flush)
            return None
        reporter = _Reporter(trainer, report, config.trainer.history.directory)
        watch = show(config, trainer, stretches, server, reporter.so_far, stack)
        waits.meanwhile = _duties(trainer, reporter, watch, should_stop)
        _run(config, trainer, flags, should_stop, drain=drain, flush=flush, reporter=reporter)
        return reporter.write()


def _run(
    config: Config,
    trainer: Trainer,
    flags: Flags,
    should_stop: Callable[[], bool],
    *,
    drain: bool,
    flush: bool,
    reporter: "_Reporter",
) -> None:
    """Train with schedules and progress; whatever ends it, the report is written."""
    checkpoint = config.trainer.checkpoint
    intervals_s = {SNAPSHOT: config.trainer.snapshot_interval_s, CHECKPOINT: checkpoint.interval_s}
    with (
        Schedule(flags, intervals_s, first_s={CHECKPOINT: checkpoint.first_interval_s}),
        show_progress(trainer) as progress,
    ):
        trainer.observe(progress)
        console.print("training: waiting for events", highlight=False)
        try:
            trainer.run(should_stop, drain=drain, flush=flush, on_saved=reporter.write)
        except SmesError:
            reporter.write()
            raise
    waiting = trainer.stream.ledger().waiting
    if waiting:
        console.print(
            f"{waiting:,} impressions are left waiting for feedback; the checkpoint holds them. At the end of a finite "
            "log, smes train --flush closes the open windows and trains on them, too",
            highlight=False,
        )


class _Reporter:
    """Writes the report, as often as it is asked to: the last one stands.

    Args:
        trainer: Whose report.
        path: Where to, if anywhere.
        history: Folder of its metrics over time, which gets the report, too; None: there is none.
    """

    def __init__(self, trainer: Trainer, path: Path | None, history: Path | None) -> None:
        self._trainer, self._path, self._history = trainer, path, history
        self._started_s, self._trained_before = time.monotonic(), trainer.trained

    def so_far(self) -> TrainingReport:
        """What the trainer knows now; it changes nothing."""
        return report_so_far(self._trainer, seconds=self._seconds, trained=self._trained)

    def write(self) -> TrainingReport:
        """Write what the trainer knows now, and return it."""
        report = training_report(self._trainer, seconds=self._seconds, trained=self._trained)
        write_report(report.to_dict(), self._path)
        if self._history is not None:
            end_history(self._history, self._trainer, report.to_dict())
        return report

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def _trained(self) -> int:
        return self._trainer.trained - self._trained_before


def _duties(
    trainer: Trainer, reporter: _Reporter | None, watch: Watch | None, should_stop: Callable[[], bool]
) -> Callable[[], None]:
    """What is done while the event log is away: the schedules, copies, and saving once a stop is asked for.

    Of several ranks, each takes part in what the others do.
    """
    saved = False

    def duties() -> None:
        nonlocal saved
        if isinstance(trainer, RankTrainer):
            trainer.take_part()
        else:
            trainer.run_requested()
        if watch is not None:
            watch.look_if_due(moved=False)
        if should_stop() and not saved and reporter is not None and not isinstance(trainer, RankTrainer):
            saved = True
            trainer.save()
            reporter.write()
            _logger.warning("the event log is away: checkpoint and report are written, and the drain waits for the log")

    return duties


def _never() -> bool:
    return False


def _checkpoints(config: Config, stack: ExitStack | None) -> CheckpointDirectory | None:
    """The folder of checkpoints; locked, if a stack is given."""
    directory = config.trainer.checkpoint.directory
    if directory is None:
        _logger.warning("trainer.checkpoint.directory is not set: a restart will have nothing to go on from")
        return None
    checkpoints = CheckpointDirectory(directory, config.trainer.checkpoint.keep)
    if stack is not None:
        stack.enter_context(checkpoints.locked())
    return checkpoints


def _journal(config: Config, checkpoints: CheckpointDirectory | None, world: World) -> BatchJournal | None:
    """Where the ends of batches are written down, beside the checkpoints; None where nothing can depend on it."""
    if checkpoints is None or config.stream.batch.max_wait_s is None:
        return None
    name = name_of(world.rank, world.size)
    return BatchJournal(checkpoints.directory / name, config.trainer.checkpoint.keep)


def _event_log(config: Config, waits: Waits, stack: ExitStack, world: World) -> WaitingLog:
    log = WaitingLog(waits.run("event log", lambda: open_event_log(config.event_log)), waits)
    stack.callback(log.close)
    if world.rank == 0:
        for topic in (IMPRESSIONS, FEEDBACK):
            log.ensure_topic(topic, config.event_log.partitions, exact=False)
    world.wait_for_all()
    return log


def _store(config: Config, waits: Waits, stack: ExitStack) -> SnapshotStore:
    settings = config.feature_store
    signer = Signer.of(settings.signing, settings.namespace)
    objects = Objects.of(settings.chunks, settings.namespace)
    client = waits.run("feature store", settings.connect)
    stack.callback(client.close)
    return SnapshotStore(client, settings.namespace, settings.snapshots, signer=signer, objects=objects)
