"""What an audit finds: a row per partition, the equations that do not hold, and notes."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from stream.audit_marks import Mark

Equation = Literal["log", "read", "ledger", "waiting", "dead_letters", "trained", "replayed"]


@dataclass(frozen=True, slots=True)
class Imbalance:
    """An equation that does not hold.

    Attributes:
        equation: Which one.
        topic, partition: Where; None for one that is about all partitions.
        message: In words, with the numbers.
        numbers: The numbers by name.
    """

    equation: Equation
    topic: str | None
    partition: int | None
    message: str
    numbers: dict[str, int]

    def __str__(self) -> str:
        where = "" if self.topic is None else f"{self.topic}/{self.partition}: "
        return f"{self.equation}: {where}{self.message}"


@dataclass(frozen=True, slots=True)
class PartitionAudit:
    """One partition, in events unless said otherwise.

    Attributes:
        topic, partition: Which one.
        begin, position, end: Offsets: the oldest record kept, the checkpoint's next record to read, the end.
        appended: Read and unread together. What was lost unread was appended, too, and never counted.
        read: Read by the trainer, those refused among them.
        recounted: Of these, in the log now.
        trained: Handed to the trainer; of feedback: attached to an impression, or trained on as a correction.
        waiting: In the join, or in batches not yet taken.
        late, duplicate, orphaned, dead_lettered: Not trained on, and why.
        dropped: Nor these: feedback of an old schema for tasks that there are no more.
        unread: In the log behind the position.
        trimmed_read: Records that retention took after they were read, in offsets.
        trimmed_unread: Records that retention took unread: they are lost, in offsets. The trainer was told to go on
            without them, or it has yet to find out.
        logs_replaced: How often the log was another one; what the one before held unread is lost, uncounted.
        gaps: Records that somebody deleted before they were read.
        unreadable: What was no record of ours; among the dead-lettered.
        letters: Events of the dead letters on it that were found, copies not counted.
        reinjected: Records that a replay of dead letters appended, among the others.
    """

    topic: str
    partition: int
    begin: int
    position: int
    end: int
    appended: int = 0
    read: int = 0
    recounted: int = 0
    trained: int = 0
    waiting: int = 0
    late: int = 0
    duplicate: int = 0
    orphaned: int = 0
    dead_lettered: int = 0
    dropped: int = 0
    unread: int = 0
    trimmed_read: int = 0
    trimmed_unread: int = 0
    logs_replaced: int = 0
    gaps: int = 0
    unreadable: int = 0
    letters: int = 0
    reinjected: int = 0


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What an audit found.

    Attributes:
        partitions: Every partition of both topics.
        imbalances: Equations that do not hold; empty: the audit balances.
        equations: How many were checked.
        notes: What could not be checked, and why.
        letters: Dead letters found, by code, in events; copies not counted.
        letters_replayed: How many letters were re-injected.
        trained, not_finite: Impressions, by the trainer's own count.
        marks: Where this audit ends.
    """

    partitions: list[PartitionAudit]
    imbalances: list[Imbalance]
    equations: int
    notes: list[str]
    letters: dict[str, int]
    letters_replayed: int
    trained: int
    not_finite: int
    marks: list[Mark]

    @property
    def balanced(self) -> bool:
        """Whether every equation holds."""
        return not self.imbalances

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "marks"}
        partitions = [asdict(each) for each in self.partitions]
        return {
            "balanced": self.balanced,
            **values,
            "partitions": partitions,
            "imbalances": [asdict(each) for each in self.imbalances],
        }
