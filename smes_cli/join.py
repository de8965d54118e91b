"""``smes join``: event log → join → topic ``examples``, with checkpoints of its own."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smes.errors import CheckpointError, SmesError, Stopped
from smes.model.deltas import whole
from smes.schema import Schema
from smes_cli.config import Config
from smes_cli.console import console, write_report
from smes_cli.schema_changes import declared_changes
from smes_cli.stored_features import open_stored_features
from stream.dead_letters import DeadLetterWriter
from stream.join.ledgers import StreamLedger
from stream.joined.turn_stream import TurnStream
from stream.joined.writer import ExampleWriter
from stream.log.event_log import EventLog
from stream.log.open_log import open_event_log
from stream.topics import EXAMPLES, FEEDBACK, IMPRESSIONS
from trainer.checkpoint_file import CheckpointView
from trainer.checkpoints import CheckpointDirectory
from trainer.waits import WaitingLog, Waits

_logger = logging.getLogger(__name__)
_POLL_S = 0.2
_PREFIX = "join."
_MODEL: dict[str, Any] = {"what": "smes join"}
"""Stands in a checkpoint where a trainer has its model: neither goes on from the other's."""


@dataclass(frozen=True, slots=True)
class JoinReport:
    """What a join has done.

    Attributes:
        ledger: Where every event is, since the join's history began. ``handed_out``: impressions written.
        turns: Turns written, since then.
        repeated, completed: Turns that were repeated after the restart that began this run, and records of them that
            were missing.
        seconds: How long this run took.
    """

    ledger: StreamLedger
    turns: int
    repeated: int
    completed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def run_join(
    config: Config,
    *,
    report: Path | None,
    drain: bool,
    flush: bool,
    skip_lost: bool,
    anew: bool,
    should_stop: Callable[[], bool],
    stop_event: threading.Event | None = None,
) -> JoinReport:
    """Join until ``should_stop``; returns the report, which is also written to ``report``.

    Args:
        config: What to join, from where, to where.
        report: Where to write the report, if anywhere.
        drain: Before stopping, join everything that is in the log by then.
        flush: After that, close the open windows, as at the end of a finite log.
        skip_lost: If the log no longer holds the checkpoint's position, continue at the oldest record that it has.
        anew: Begin at the log's beginning where there is no checkpoint, though there are examples in the topic.
        should_stop: Asked between two reads.
        stop_event: Set when a stop is asked for; waits inside the event log hear it.

    Raises:
        EventLogError: The log was not reachable, lost something, or another join writes to the topic.
        CheckpointError: Another join uses the folder, or there is no checkpoint where one is needed.
        SmesError, ValueError: As the components raise them.
    """
    directory = config.examples.directory
    if directory is None:
        raise ValueError("examples.directory: not set, expected a folder for the checkpoints of smes join")
    if config.trainer.checkpoint.directory == directory:
        raise ValueError(f"examples.directory: {directory} is trainer.checkpoint.directory, expected another folder")
    schema, drain = config.schema_file().schema, drain or flush
    with ExitStack() as stack:
        checkpoints = CheckpointDirectory(directory, config.examples.keep)
        stack.enter_context(checkpoints.locked())
        stops = None if drain else stop_event
        waits = Waits((lambda: False) if drain else should_stop)
        log = WaitingLog(waits.run("event log", lambda: open_event_log(config.event_log)), waits)
        stack.callback(log.close)
        log.set_stop(stops)
        ensure_topics(config, log)
        stream = TurnStream(
            schema,
            config.stream,
            log,
            DeadLetterWriter(log),
            changes=declared_changes(config),
            features=open_stored_features(config, config.schema_file(), waits, stops, stack),
        )
        writer = ExampleWriter(schema, config.examples, stream, log)
        run = _Run(schema, config, stream, writer, checkpoints, report)
        run.begin(anew=anew, skip_lost=skip_lost)
        return run.until(should_stop, drain=drain, flush=flush)


def ensure_topics(config: Config, log: EventLog) -> None:
    """Make the topics of events, and that of examples with as many partitions, where they are not there yet."""
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, config.event_log.partitions, exact=False)
    log.ensure_topic(EXAMPLES, log.partitions(IMPRESSIONS), exact=False)


class _Run:
    """One run of the join, from its checkpoint to its stop."""

    def __init__(
        self,
        schema: Schema,
        config: Config,
        stream: TurnStream,
        writer: ExampleWriter,
        checkpoints: CheckpointDirectory,
        report: Path | None,
    ) -> None:
        self._schema, self._stream, self._writer = schema, stream, writer
        self._checkpoints, self._report = checkpoints, report
        self._interval_s, self._started_s = config.examples.checkpoint_interval_s, time.monotonic()
        self._saved_s = self._started_s

    def begin(self, *, anew: bool, skip_lost: bool) -> None:
        """Go on from the newest checkpoint, or begin anew; then there is one, whatever happens next."""
        found = self._checkpoints.newest(schema=self._schema, model=_MODEL)
        if found is not None:
            state = {name.removeprefix(_PREFIX): array.copy() for name, array in found.arrays.items()}
            if skip_lost:
                self._skip_lost(state)
            else:
                self._writer.resume(state)
            console.print(
                f"join: going on from the checkpoint of turn {found.step}; {self._writer.repeated} turns since were "
                f"repeated, {self._writer.completed} records of them were missing",
                highlight=False,
            )
        elif not anew and self._writer.has_written_before():
            raise CheckpointError(
                f"{self._checkpoints.directory}: no checkpoint, but topic {EXAMPLES!r} has examples: expected the "
                "folder of their join's checkpoints (examples.directory), or --anew: join the event log from its "
                "beginning again, and what is in both comes twice"
            )
        else:
            self._writer.begin_anew()
        self.save()

    def _skip_lost(self, state: dict[str, Any]) -> None:
        """Go on behind what the log has lost; turns that were written since the checkpoint are not repeated."""
        self._writer.resume_behind(state)
        for skipped in self._stream.skip_lost().values():
            _logger.error("%s", skipped)

    def until(self, should_stop: Callable[[], bool], *, drain: bool, flush: bool) -> JoinReport:
        """Join until then; whatever ends it, what is written is in a checkpoint and in the report."""
        console.print("join: waiting for events", highlight=False)
        try:
            while not should_stop():
                self._advance()
            if drain:
                end = self._stream.end()
                while not self._stream.has_reached(end):
                    self._advance()
            if flush:
                self._writer.flush()
            self._writer.settle()
            self.save()
        except Stopped as stopped:
            _logger.warning("%s; what was not written yet is joined again after the next start", stopped)
        except SmesError:
            self._write_report()
            raise
        return self._write_report()

    def _advance(self) -> None:
        self._writer.advance(_POLL_S)
        if time.monotonic() - self._saved_s >= self._interval_s:
            self._writer.settle()
            self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        self._writer.note_written()
        self._checkpoints.save(
            CheckpointView(
                lineage="join",
                step=self._writer.number,
                schema=self._schema.to_dict(),
                schema_hash=self._schema.hash,
                model=_MODEL,
                arrays={_PREFIX + name: whole(array) for name, array in self._writer.state().items()},
            )
        )
        self._saved_s = time.monotonic()

    def _write_report(self) -> JoinReport:
        result = JoinReport(
            ledger=self._stream.ledger(),
            turns=self._writer.number,
            repeated=self._writer.repeated,
            completed=self._writer.completed,
            seconds=time.monotonic() - self._started_s,
        )
        write_report(result.to_dict(), self._report)
        return result
