"""The exceptions that SMES Online raises.

    SmesError                     what goes wrong in operation
    ├── SchemaMismatch            two parts were built from different schemas
    ├── SnapshotError             a snapshot is incomplete, damaged or unreadable
    │   ├── SnapshotDamaged       the bytes of its payload are not those that were published
    │   ├── SnapshotForged        it, or what says that it is served, is not signed as configured
    │   ├── PinError              what an operator decided about serving cannot be read, or names what is gone
    │   ├── SnapshotNotFound      nothing was published yet, or retention removed it
    │   └── SnapshotStale         its lineage has already published this version or a later one
    ├── LeaseHeld                 another trainer holds the right to publish
    ├── LeaseLost                 this trainer's right to publish was taken over
    ├── CheckpointError           a checkpoint on disk cannot be restored, or another trainer holds their folder
    │   └── ModelMismatch         it was trained with another configuration of the model
    ├── ServingWithoutCheckpoint  a model is in service, but the trainer has no checkpoint to go on from
    ├── StepsNotFinite            several steps in a row had a loss or gradients that are not finite
    ├── EventLogError             the event log refused or lost something
    │   ├── EventLogUnavailable   no answer within the bounded wait
    │   ├── PositionOutOfRange    the records at a position were trimmed away
    │   └── LogReplaced           a position belongs to another log of the same name
    ├── FeatureStoreError         Redis refused a command (memory full) or holds data of another schema
    │   └── FeatureStoreUnavailable   no answer within the bounded wait
    ├── RankLost                  another rank of the training ended, or did not answer in time
   ├── RankFailed                another rank of the training stopped it; it says why
   ├── LogError                  a logged-impressions file cannot be read as described
    └── Stopped                   a wait ended early because a stop was asked for

A wrong argument raises ``ValueError``. An ``assert`` states what can only be false if our own code is wrong.
"""


class SmesError(Exception):
    """Base of every operational error of SMES Online."""


class SchemaMismatch(SmesError):
    """Two parts were built from different schemas. The message names both hashes, and what differs where that is known.

    Args:
        where: What has the other schema.
        expected: Hash of the configured schema.
        got: The other hash.
        difference: From :func:`smes.schema_difference.describe_difference`; empty where only the hash is known.
    """

    def __init__(self, where: str, *, expected: str, got: str, difference: str = "") -> None:
        known = f"configured: {difference}" if difference else "what differs is not known here, for it holds no schema"
        super().__init__(f"{where}: schema hash {got} differs from the configured schema's {expected}; {known}")
        self.expected = expected
        self.got = got


class SnapshotError(SmesError):
    """A snapshot is incomplete, damaged or unreadable."""


class SnapshotDamaged(SnapshotError):
    """The bytes of a payload are not those that were published. The message names the chunk."""


class SnapshotForged(SnapshotError):
    """A record of the store is unsigned or wrongly signed, where keys are configured."""


class PinError(SnapshotError):
    """What an operator decided about serving is broken, gone or an older record, or names a version that is gone."""


class SnapshotNotFound(SnapshotError):
    """No such snapshot: nothing was published yet, or retention removed it."""


class SnapshotStale(SnapshotError):
    """The lineage's current snapshot has this version or a later one. Serving never goes back to an older version."""


class SnapshotGap(SnapshotError):
    """A delta applies to a version that is not the current one, or that cannot be loaded any more; nothing was changed.

    A full snapshot ends this.
    """


class LeaseHeld(SmesError):
    """Another publisher holds the namespace's lease. The message says who, since when and until when.

    Attributes:
        holder: What it calls itself.
        since_ms: When it took the lease, Unix milliseconds by the server's clock.
        until_ms: When the lease ends unless it is renewed, likewise.
    """

    def __init__(self, message: str, *, holder: str, since_ms: int, until_ms: int) -> None:
        super().__init__(message)
        self.holder = holder
        self.since_ms = since_ms
        self.until_ms = until_ms


class LeaseLost(SmesError):
    """The lease expired and another publisher took it; nothing was changed. Publishing again cannot succeed."""


class CheckpointError(SmesError):
    """A checkpoint on disk cannot be written or restored, or another trainer holds the folder of checkpoints."""


class ModelMismatch(CheckpointError):
    """A checkpoint was trained with another configuration of the model; the message names the keys that differ."""


class ServingWithoutCheckpoint(SmesError):
    """A model is in service, but the trainer has no checkpoint. The message says what to ask for."""


class StepsNotFinite(SmesError):
    """Several training steps in a row had a loss or gradients that are not finite."""


class EventLogError(SmesError):
    """The event log refused or lost something."""


class EventLogUnavailable(EventLogError):
    """The event log gave no answer within the bounded wait."""


class PositionOutOfRange(EventLogError):
    """The records at a requested position are no longer (or not yet) in the log."""


class LogReplaced(EventLogError):
    """A position belongs to another incarnation of the log: the topic was deleted and made again, or came back empty.

    The message names both incarnations.
    """


class FeatureStoreError(SmesError):
    """Redis refused a command, or holds data that this schema does not write."""


class FeatureStoreUnavailable(FeatureStoreError):
    """Redis gave no answer within the bounded wait."""


class RankLost(SmesError):
    """Another rank of the training ended, or did not answer in time: nothing can be decided together any more."""


class RankFailed(SmesError):
    """Another rank of the training met an error, and all ranks stopped together. Its own message says which."""


class LogError(SmesError):
    """A logged-impressions file cannot be read as its schema file describes it."""


class Stopped(SmesError):
    """A wait for a server ended early because a stop was asked for. The message names what was waited for."""


WRONG_INPUT = (ValueError, SchemaMismatch, ModelMismatch)
"""What the same start would meet again: wrong input, or a configuration that does not fit what is there."""
