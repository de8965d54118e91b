"""``smes backtest --checkpoint`` and ``smes train --from``: a log in files primes the live loop."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from feature_store.snapshots import SnapshotStore
from smes.arrays import Arrays, prefixed, under
from smes.errors import CheckpointError, ServingWithoutCheckpoint
from smes_cli.config import Config
from smes_cli.console import console
from smes_cli.starting_point import InService, WithoutCheckpoint, model_in_service
from smes_cli.times import utc
from smes_io.clock import wall_clock_ms
from stream.join.watermarks import START_OF_TIME
from stream.log.event_log import EventLog, Positions
from stream.priming import Primed, is_of_blocks, live_state, primed_by
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.checkpoint_file import Checkpoint
from trainer.checkpoints import CheckpointDirectory
from trainer.loop import Trainer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrimedStart:
    """Where a live training begins that a log in files has primed.

    Attributes:
        folder: Of the checkpoint that ``smes backtest --checkpoint`` has written.
        since_ms: Reading begins with what arrived in the event log at this time; None: with what can follow the log in
            files.
    """

    folder: Path
    since_ms: int | None = None


def empty_folder(folder: Path, expected: str) -> CheckpointDirectory:
    """A folder for checkpoints that has none yet; it is made if it is missing.

    Raises:
        ValueError: It has one.
        CheckpointError: It cannot be made.
    """
    checkpoints = CheckpointDirectory(folder, keep=1)
    if not checkpoints.is_empty:
        raise ValueError(f"{folder}: has a checkpoint already, expected {expected}")
    return checkpoints


def begin_primed(
    start: PrimedStart, config: Config, trainer: Trainer, log: EventLog, store: SnapshotStore, other: WithoutCheckpoint
) -> InService:
    """Bring a new trainer to where a log in files has brought it, with a first checkpoint of its own.

    Args:
        start: From where.
        config: Its ``stream.max_future_s`` says how far an event's time may lie ahead of its arrival.
        trainer: Has trained on nothing yet.
        log: The live log; both topics exist.
        store: Where the model in service is.
        other: Whether a model in service is to be replaced.

    Returns:
        The snapshot in service.

    Raises:
        ValueError: The time to read from is yet to come.
        ServingWithoutCheckpoint: A model is in service, and nobody said that it is to be replaced.
        CheckpointError, SchemaMismatch: There is no checkpoint of a log in files that fits.
    """
    if start.since_ms is not None and start.since_ms > wall_clock_ms():
        raise ValueError(f"--since: {utc(start.since_ms)} UTC, expected a time that is over")
    in_service = model_in_service(store)
    if (in_service.manifest is not None or in_service.problem is not None) and not other.anew:
        raise ServingWithoutCheckpoint(
            "--from: a model is in service, expected --anew beside it (start a new lineage and replace that model)"
        )
    checkpoint = read_primed(start.folder, trainer)
    offline = under("stream.", checkpoint.arrays)
    primed = primed_by(offline)
    positions = _positions(start, primed, round(config.stream.max_future_s * 1000), log)
    incarnations = log.incarnations(IMPRESSIONS) | log.incarnations(FEEDBACK)
    others = {name: array for name, array in checkpoint.arrays.items() if not name.startswith("stream.")}
    arrays: Arrays = others | prefixed("stream.", live_state(offline, positions, incarnations))
    trainer.prime(replace(checkpoint, arrays=arrays))
    trainer.checkpoint()  # from here on this trainer goes on from its own
    waiting = trainer.stream.ledger().waiting
    console.print(
        f"primed by {trainer.trained:,} impressions up to {utc(primed.newest_ms)} UTC, {checkpoint.step:,} steps; "
        f"{waiting:,} more wait for feedback; going on as lineage {trainer.lineage}",
        highlight=False,
    )
    how = "by their ids" if primed.own_ids else "by their time, because the log has no ids"
    console.print(f"events that the primed log holds, too, are told {how}, and dropped", highlight=False)
    return in_service


def read_primed(folder: Path, trainer: Trainer) -> Checkpoint:
    """The checkpoint of a log in files.

    Raises:
        CheckpointError: There is none, or it is of a live stream, of another model or format, or damaged.
        SchemaMismatch: It is of another schema.
    """
    expected = "the folder of a checkpoint that smes backtest --checkpoint has written"
    if not folder.is_dir():
        raise CheckpointError(f"--from {folder}: no such folder, expected {expected}")
    learner = trainer.learner
    checkpoint = CheckpointDirectory(folder, keep=1).newest(schema=learner.schema, model=learner.config.to_dict())
    if checkpoint is None:
        raise CheckpointError(f"--from {folder}: no checkpoint in it, expected {expected}")
    if not is_of_blocks(under("stream.", checkpoint.arrays)):
        raise CheckpointError(
            f"--from {folder}: the checkpoint of a live trainer, expected {expected}; trainer.checkpoint.directory is "
            "the folder to go on from"
        )
    return checkpoint


def _positions(start: PrimedStart, primed: Primed, max_future_ms: int, log: EventLog) -> Positions:
    """Where the live stream begins; what may be missing between the two logs is said."""
    reached_ms = primed.newest_ms if primed.newest_ms != START_OF_TIME else 0
    # An event may be so much older by its arrival than by its own time, and still be accepted.
    since_ms = max(0, reached_ms - max_future_ms) if start.since_ms is None else start.since_ms
    if since_ms > reached_ms:
        _logger.warning(
            "--since %s UTC lies after the newest impression of the primed log, of %s UTC: what arrived between is not "
            "read",
            utc(since_ms),
            utc(reached_ms),
        )
    positions: Positions = {}
    for topic in (IMPRESSIONS, FEEDBACK):
        begin, found = log.begin(topic), log.at_time(topic, since_ms)
        positions |= found
        for at, position in found.items():
            if position == begin[at] > 0:
                _logger.warning(
                    "%s/%d: the log begins at offset %d, which arrived at %s UTC or later: what came between may have "
                    "been trimmed unread",
                    at.topic,
                    at.partition,
                    position,
                    utc(since_ms),
                )
    told = ", ".join(f"{at.topic}/{at.partition} at {position:,}" for at, position in sorted(positions.items()))
    console.print(f"reading what arrived from {utc(since_ms)} UTC on: {told}", highlight=False, soft_wrap=True)
    return positions
