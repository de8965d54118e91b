"""Where a trainer begins: at its newest checkpoint, at the snapshot in service, or anew.

A trainer without a checkpoint does not simply begin anew where a model is in service: its first snapshots would replace
a trained model by an untrained one. It stops and asks what is meant.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from feature_store.folding import read_weights
from feature_store.publication import Manifest
from feature_store.snapshots import SnapshotStore
from smes.errors import SchemaMismatch, ServingWithoutCheckpoint, SnapshotError
from smes.schema_difference import describe_difference_from
from smes_cli.console import console
from stream.example_stream import ExampleStream
from stream.joined.joined_stream import JoinedStream
from stream.log.event_log import TopicPartition
from trainer.checkpoint_file import Checkpoint, differences
from trainer.loop import Trainer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WithoutCheckpoint:
    """What to do where there is no checkpoint but a model is in service. Neither: stop and ask.

    Attributes:
        from_snapshot: Go on from the snapshot in service; where operators decided which that is, from that one.
        anew: Start over, and replace it.
    """

    from_snapshot: bool = False
    anew: bool = False

    def __post_init__(self) -> None:
        if self.from_snapshot and self.anew:
            raise ValueError("--from-snapshot --anew: expected at most one of the two")


class InService(NamedTuple):
    """The snapshot in service: its manifest, or why it cannot be read. Both None: there is none."""

    manifest: Manifest | None
    problem: str | None


def find_starting_point(
    trainer: Trainer,
    stream: ExampleStream | JoinedStream,
    store: SnapshotStore,
    otherwise: WithoutCheckpoint,
    carried_over: Callable[[Checkpoint], Checkpoint] | None = None,
) -> InService:
    """Bring a new trainer to where it begins.

    Args:
        trainer: Has trained on nothing yet.
        stream: Its stream.
        store: Where the model in service is.
        otherwise: What to do without a checkpoint.
        carried_over: As :meth:`trainer.loop.Trainer.restore`.

    Returns:
        The snapshot in service.

    Raises:
        CheckpointError, SchemaMismatch: A checkpoint is there, but none that can be used.
        ServingWithoutCheckpoint: There is no checkpoint, but a model is in service.
        SnapshotError: The snapshot to go on from cannot be used.
    """
    in_service = model_in_service(store)
    served, problem = in_service
    step = trainer.restore(carried_over)
    if step is not None:
        console.print(f"going on from the checkpoint of step {step} of lineage {trainer.lineage}", highlight=False)
        if otherwise.from_snapshot or otherwise.anew:
            _logger.warning("--from-snapshot and --anew have no effect: there is a checkpoint, of step %d", step)
        return in_service
    if served is None and problem is None:
        return in_service
    what = f"version {served.version} of lineage {served.lineage}" if served else f"a snapshot ({problem})"
    if otherwise.anew:
        _logger.warning("starting anew: the first snapshot of this trainer replaces %s, which is in service", what)
    elif not otherwise.from_snapshot:
        raise ServingWithoutCheckpoint(
            f"there is no checkpoint, but {what} is in service: expected the folder of its checkpoints "
            "(trainer.checkpoint.directory), or --from-snapshot (go on from the snapshot: the optimisers begin anew, "
            "and impressions that waited for feedback are lost), or --anew (start over and replace it)"
        )
    elif served is None:
        raise SnapshotError(f"--from-snapshot: {problem}, expected a snapshot that can be read, or --anew")
    else:
        # What operators put into service, rather than what they rolled back. It may be an older version; the trainer
        # forks from it.
        _go_on_from(store.to_serve() or served, trainer, stream, store)
    trainer.checkpoint()  # so that the question is answered once
    return in_service


def model_in_service(store: SnapshotStore) -> InService:
    """The snapshot in service, whatever is wrong with it."""
    try:
        return InService(store.current(), None)
    except SnapshotError as error:
        _logger.warning("the snapshot in service cannot be read: %s", error)
        return InService(None, str(error))


def _go_on_from(served: Manifest, trainer: Trainer, stream: ExampleStream | JoinedStream, store: SnapshotStore) -> None:
    name, schema = f"snapshot {served.lineage}:{served.version}", trainer.learner.schema
    tensors, metadata = read_weights(store, served)
    if metadata.get("schema_hash") != schema.hash:
        difference = describe_difference_from(metadata.get("schema"), schema)
        got = metadata.get("schema_hash", "none")
        raise SchemaMismatch(name, expected=schema.hash, got=got, difference=difference)
    configured = json.loads(json.dumps(trainer.learner.config.to_dict()))
    if changed := differences(json.loads(metadata.get("model", "{}")), configured):
        raise SnapshotError(
            f"{name}: trained with another model configuration (differs in: {', '.join(changed)}), expected the same"
        )
    try:
        trainer.start_from(tensors, served)
    except ValueError as error:
        raise SnapshotError(f"{name}: {error}") from error
    found = {TopicPartition(t, int(p)): n for t, partitions in served.positions.items() for p, n in partitions.items()}
    if unknown := sorted(found.keys() - stream.positions.keys()):
        at = ", ".join(f"{source.topic}/{source.partition}" for source in unknown)
        raise SnapshotError(f"{name}: positions in {at}, expected partitions that the event log has")
    stream.move_to(found)
    _logger.warning(
        "going on from %s as lineage %s at step %d, without a checkpoint. That costs: impressions that waited for "
        "feedback at that moment are not trained on, up to %g s of event time, and feedback that is still to come for "
        "them is orphaned; the optimisers begin anew; metrics and ledgers count from here",
        name,
        trainer.lineage,
        served.step,
        schema.max_window_ms / 1000,
    )
