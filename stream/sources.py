"""Where the stream is in its topics, and which log that is: partitions may be added, and a topic may be another one.

What the broker can change is asked again every few seconds:

- A partition that was added is read from its beginning.
- ``feedback`` may have more partitions than ``impressions``, as while an operator lets both grow. With fewer, feedback
  could not have the partition number of its impression: that is an error at once.
- A topic that was deleted and made again, or a server that came back empty, is another *incarnation* of the log
  (:meth:`stream.log.event_log.EventLog.incarnations`). A position in one says nothing about the other.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smes.arrays import Arrays
from smes.errors import EventLogError, LogReplaced
from smes_io.clock import wait_until
from stream.join.ledgers import COLUMNS, READ
from stream.log.event_log import EventLog, Positions, TopicPartition
from stream.partition_state import state_name
from stream.topics import FEEDBACK, IMPRESSIONS

_OLD_S = 1.5  # a log's number of partitions is at most a second old
_UNKNOWN = ""  # incarnation of a partition that never had a record, or of a state from before they were kept


@dataclass(frozen=True, slots=True)
class Skipped:
    """What going on at another position costs.

    Attributes:
        source: The partition.
        before: Next record to read by the state, which the log does not hold.
        now: Where reading goes on: at the oldest record.
        end: Where the partition ends.
        was: Incarnation of the log that ``before`` belongs to; None where that is the present one.
        incarnation: The present one.
    """

    source: TopicPartition
    before: int
    now: int
    end: int
    was: str | None
    incarnation: str

    def __str__(self) -> str:
        where = f"{self.source.topic} partition {self.source.partition}: going on at {self.now}, not {self.before}"
        rest = f"{self.end - self.now} records from there to the end"
        if self.was is not None:
            lost = f"what the old log held from {self.before} on is lost"
            return f"{where}: the log is another one ({_named(self.incarnation)}, was {self.was}): {rest}; {lost}"
        if self.before < self.now:
            return f"{where}: the {self.now - self.before} records between were trimmed unread; {rest}"
        return f"{where}: the log ended before that position; {rest}"

    @property
    def trimmed(self) -> int:
        """How many records were trimmed unread, counted in offsets; 0 where nobody can know."""
        return max(0, self.now - self.before) if self.was is None else 0


class Share(NamedTuple):
    """The partitions that one of several readers reads, of both topics: those with p ≡ ``rank`` (mod ``of_ranks``).

    Attributes:
        rank: 0 ≤ rank < ``of_ranks``.
        of_ranks: How many readers there are, ≥ 1.
    """

    rank: int
    of_ranks: int

    def has(self, partition: int) -> bool:
        """Whether this reader reads the partition."""
        return partition % self.of_ranks == self.rank

    def of(self, partitions: int) -> range:
        """Those of so many partitions that this reader reads."""
        return range(self.rank, partitions, self.of_ranks)

    def require(self, partitions: int) -> None:
        """Check that every reader has a partition of the impressions.

        Raises:
            ValueError: There are more readers than partitions.
        """
        if partitions < self.of_ranks:
            raise ValueError(
                f"{self.of_ranks} ranks: topic {IMPRESSIONS!r} has {partitions} partitions, expected at least one for "
                "each rank"
            )


WHOLE_LOG = Share(0, 1)
"""All partitions."""


class Refused(NamedTuple):
    """What was read of a partition, or passed over, and never came to the join.

    Attributes:
        dead_lettered: Events refused.
        unknown_fields: Fields of other events that the schema does not have.
        gaps: Records that the log no longer holds.
        unreadable: Records that nobody can read as one of ours, each dead-lettered as well.
        dropped: Feedback for tasks that there are no more.
    """

    dead_lettered: int = 0
    unknown_fields: int = 0
    gaps: int = 0
    unreadable: int = 0
    dropped: int = 0


class Counted(NamedTuple):
    """What a state has counted of a partition, all incarnations of the log together.

    Attributes:
        read: Events read, those that were refused or dropped among them.
        dead_lettered: Events refused.
        gaps: Records passed over.
    """

    read: int
    dead_lettered: int
    gaps: int


class Began(NamedTuple):
    """Where the reading of the present incarnation of a partition began, and what was :class:`Counted` by then."""

    position: int
    read: int
    dead_lettered: int
    gaps: int


class Lost(NamedTuple):
    """What was never read of a partition, and somebody has accepted.

    Attributes:
        trimmed: Records that retention took unread, counted in offsets.
        replaced: How often the log was another one. What the one before still held was lost; nobody knows how much.
    """

    trimmed: int
    replaced: int


class Sources:
    """The partitions of impressions and feedback, and the next record to read of each.

    Attributes:
        positions: Next record to read of every partition known.
        began: Where the reading of each began.
        lost: What was never read of each.

    Args:
        log: Where both topics exist.
        refresh_s: Seconds between two looks at what the broker may have changed.
        monotonic: Seconds of a clock that never goes back.
        share: Which partitions are read.

    Raises:
        EventLogError: ``feedback`` has fewer partitions than ``impressions``.
        ValueError: There are more ranks than partitions.
    """

    def __init__(
        self,
        log: EventLog,
        refresh_s: float,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        share: Share = WHOLE_LOG,
    ) -> None:
        self.positions: Positions = {}
        self.began: dict[TopicPartition, Began] = {}
        self.lost: dict[TopicPartition, Lost] = {}
        self._log, self._refresh_s, self._monotonic, self._share = log, refresh_s, monotonic, share
        self._incarnations: dict[TopicPartition, str] = {}
        self._due_s = monotonic()
        self.refresh()

    def refresh_if_due(self) -> list[TopicPartition]:
        """:meth:`refresh`, if the last one is long enough ago."""
        return self.refresh() if self._monotonic() >= self._due_s else []

    def refresh(self) -> list[TopicPartition]:
        """Ask the log what it is now. Partitions that were added have a position from then on.

        Returns:
            The partitions added.

        Raises:
            EventLogError: ``feedback`` has fewer partitions than ``impressions``; the message names both numbers.
            LogReplaced: Positions belong to another incarnation; the message names both.
            EventLogUnavailable: No answer within the log's bounded wait. After any error, nothing has changed.
        """
        present = self._present()
        self._require_same_log(present)
        added = sorted(source for source in present if source not in self.positions)
        if added:
            begin = self._begin()
            self.positions.update({source: begin[source] for source in added})
            self.began.update({source: Began(begin[source], 0, 0, 0) for source in added})
            self.lost.update({source: Lost(0, 0) for source in added})
        self._incarnations.update(present)
        self._due_s = self._monotonic() + self._refresh_s
        return added

    def identify(self, read: set[TopicPartition]) -> None:
        """Ask for the incarnations of partitions whose first records were read now: an empty one may have had none."""
        if any(self._incarnations.get(source, _UNKNOWN) == _UNKNOWN for source in read):
            present = self._present()
            self._require_same_log(present)
            self._incarnations.update({s: present[s] for s in self.positions if s in present})

    def skip_lost(self, counted: Callable[[], Mapping[TopicPartition, Counted]]) -> dict[TopicPartition, Skipped]:
        """Move positions that the log does not hold to its oldest record, and take it for the log from now on.

        Args:
            counted: What was counted so far; asked if anything moves.

        Returns:
            What moved.
        """
        present = self._present()
        begin, end = self._begin(), self.end()
        skipped = {}
        for source, position in self.positions.items():
            was = self._incarnations.get(source, _UNKNOWN)
            replaced = was not in (_UNKNOWN, present.get(source, _UNKNOWN))
            if replaced or not begin[source] <= position <= end[source]:
                skipped[source] = Skipped(
                    source, position, begin[source], end[source], was if replaced else None, present[source]
                )
        self.positions.update({source: each.now for source, each in skipped.items()})
        self._incarnations.update(present)
        counts = counted() if skipped else {}
        for source, each in skipped.items():
            before = self.lost.get(source, Lost(0, 0))
            self.began[source] = Began(each.now, *counts[source])
            self.lost[source] = Lost(before.trimmed + each.trimmed, before.replaced + (each.was is not None))
        return skipped

    def end(self) -> Positions:
        """Where both topics end now."""
        return self._shared({**self._log.end(IMPRESSIONS), **self._log.end(FEEDBACK)})

    def state(self) -> Arrays:
        """Positions and incarnations by partition; see :mod:`stream.partition_state`."""
        state: Arrays = {}
        for source, position in self.positions.items():
            state[state_name(source.topic, source.partition, "position")] = np.array([position], np.int64)
            text = self._incarnations.get(source, _UNKNOWN).encode()
            state[state_name(source.topic, source.partition, "incarnation")] = np.frombuffer(text, np.uint8)
            state[state_name(source.topic, source.partition, "began")] = np.array(self.began[source], np.int64)
            state[state_name(source.topic, source.partition, "lost")] = np.array(self.lost[source], np.int64)
        return state

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`. Partitions that were added since keep the position of their beginning.

        Whether the positions belong to the present log is found by the next refresh, which is due at once.
        """
        for source in self.positions:
            position = state.get(state_name(source.topic, source.partition, "position"))
            if position is not None:
                self.positions[source] = int(position[0])
                incarnation = state.get(state_name(source.topic, source.partition, "incarnation"))
                text = b"" if incarnation is None else incarnation.tobytes()
                self._incarnations[source] = text.decode(errors="replace")
                self.began[source] = began_in(state, source)
                self.lost[source] = lost_in(state, source)
        self._due_s = self._monotonic()

    def _present(self) -> dict[TopicPartition, str]:
        """Every partition of the share that there is now → its incarnation."""
        partitions = {topic: self._log.partitions(topic) for topic in (IMPRESSIONS, FEEDBACK)}
        if partitions[FEEDBACK] < partitions[IMPRESSIONS]:
            # Both may have grown a moment ago: the log may know one number anew and the other from before.
            wait_until(lambda: self._log.partitions(FEEDBACK) >= partitions[IMPRESSIONS], timeout_s=_OLD_S)
            partitions[FEEDBACK] = self._log.partitions(FEEDBACK)
        if partitions[FEEDBACK] < partitions[IMPRESSIONS]:
            raise EventLogError(
                f"topic {FEEDBACK!r}: {partitions[FEEDBACK]} partitions, expected at least {partitions[IMPRESSIONS]} "
                f"as topic {IMPRESSIONS!r} has: let {FEEDBACK!r} grow first"
            )
        self._share.require(partitions[IMPRESSIONS])
        known = {**self._log.incarnations(IMPRESSIONS), **self._log.incarnations(FEEDBACK)}
        sources = (TopicPartition(topic, p) for topic, count in partitions.items() for p in self._share.of(count))
        return {source: known.get(source, _UNKNOWN) for source in sources}

    def _require_same_log(self, present: Mapping[TopicPartition, str]) -> None:
        other = {
            source: (was, present.get(source, _UNKNOWN))
            for source, was in sorted(self._incarnations.items())
            if was not in (_UNKNOWN, present.get(source, _UNKNOWN))
        }
        if other:
            source, (was, now) = next(iter(other.items()))
            partitions = ", ".join(f"{s.topic}/{s.partition}" for s in other)
            raise LogReplaced(
                f"{source.topic}/{source.partition}: position {self.positions[source]} of log {was}, expected the same "
                f"log, found {_named(now)}: the topic was made anew; positions that no longer hold: {partitions}"
            )

    def _begin(self) -> Positions:
        return self._shared({**self._log.begin(IMPRESSIONS), **self._log.begin(FEEDBACK)})

    def _shared(self, positions: Positions) -> Positions:
        return {source: position for source, position in positions.items() if self._share.has(source.partition)}


def refused_in(state: Arrays, source: TopicPartition) -> Refused:
    """What a stream's state has counted of a partition; zeros where it knows nothing of it."""
    counts = state.get(state_name(source.topic, source.partition, "refused"))
    return Refused() if counts is None else Refused(*counts.tolist())


def counted_in(state: Arrays, source: TopicPartition) -> Counted:
    """What a stream's state has counted of a partition; zeros where it knows nothing of it."""
    ledger = state.get(state_name(source.topic, source.partition, "ledger"), np.zeros(len(COLUMNS), np.int64))
    refused = refused_in(state, source)
    return Counted(int(ledger[READ]) + refused.dead_lettered + refused.dropped, refused.dead_lettered, refused.gaps)


def began_in(state: Arrays, source: TopicPartition) -> Began:
    """Where a stream's state says that the reading of a partition began.

    Raises:
        KeyError: It does not say so.
    """
    return Began(*state[state_name(source.topic, source.partition, "began")].tolist())


def lost_in(state: Arrays, source: TopicPartition) -> Lost:
    """What a stream's state says was lost of a partition.

    Raises:
        KeyError: It does not say so.
    """
    return Lost(*state[state_name(source.topic, source.partition, "lost")].tolist())


def _named(incarnation: str) -> str:
    return incarnation or "an empty one"
