"""What the console knows of the dead letters: read once, kept small, counted by what they have in common.

The topic may hold a million letters, and a page looks every second. So each letter is read once and kept as five
numbers, and the newest ones also with what a list shows of them.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from smes.arrays import I64, Bool
from stream.dead_letter_reading import (
    Entry,
    Foreign,
    ReplayNote,
    StoredLetter,
    entry_of,
    read_some,
    topic_bounds,
)
from stream.log.event_log import EventLog, Positions, TopicPartition
from stream.topics import DEAD_LETTERS

_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000
_NEWEST = 2000  # letters that are kept with what a list shows
_MOST_BARS = 72
_REASON = 300  # characters
_DTYPE = np.dtype([("number", "u8"), ("at", "i4"), ("offset", "i8"), ("kind", "i4"), ("events", "i8"), ("ms", "i8")])


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which letters are meant; None means all.

    Attributes:
        reason, topic, partition: Of the event.
        since_ms, until_ms: When the letter was written, Unix milliseconds; the second is not included.
    """

    reason: str | None = None
    topic: str | None = None
    partition: int | None = None
    since_ms: int | None = None
    until_ms: int | None = None


class LetterCatalog:
    """The letters of a log. Thread-safe; nobody waits for what another thread reads.

    Args:
        monotonic: Seconds of a clock that never goes back.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock, self._refreshing = threading.Lock(), threading.Lock()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._positions: Positions = {}
        self._logs: dict[TopicPartition, str] = {}
        self._kinds: dict[tuple[str, str, int], int] = {}  # (reason, topic, partition) → its number
        self._rows = np.zeros(0, _DTYPE)
        self._new: list[tuple[int, ...]] = []
        self._newest: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._replayed: set[int] = set()
        self._foreign = 0
        self._read, self._of = 0, 0

    def refresh(self, log: EventLog, within_s: float) -> None:
        """Read what is new, as far as the time allows; the next call goes on.

        Raises:
            EventLogError, EventLogUnavailable: As the log raises them.
        """
        with self._refreshing:
            until_s = self._monotonic() + within_s
            begin, end = topic_bounds(log)
            logs = log.incarnations(DEAD_LETTERS) if end else {}
            with self._lock:
                self._follow(begin, logs)
            for at in sorted(end):
                while (before := self._positions[at]) < end[at] and self._monotonic() < until_s:
                    entries, after = read_some(log, at, before, end[at])
                    with self._lock:
                        self._positions[at] = after
                        for entry in entries:
                            self._add(entry)
                    if after == before:
                        break  # nothing came in time
            with self._lock:
                self._settle(begin, end)

    def _follow(self, begin: Positions, logs: dict[TopicPartition, str]) -> None:
        if any(logs.get(at) != name for at, name in self._logs.items()):
            self._begin_anew()  # another topic of the same name
        self._logs = logs
        for at, first in begin.items():
            self._positions[at] = max(first, self._positions.get(at, first))

    def _settle(self, begin: Positions, end: Positions) -> None:
        if self._new:
            self._rows = np.concatenate([self._rows, np.array(self._new, _DTYPE)])
            self._new = []
            # A letter that was written twice counts once, as what was read first.
            self._rows = self._rows[np.sort(np.unique(self._rows["number"], return_index=True)[1])]
        self._drop_before(begin)
        self._of = sum(end[at] - begin[at] for at in end)
        self._read = sum(min(end[at], self._positions[at]) - begin[at] for at in end)

    def _add(self, entry: Entry) -> None:
        if isinstance(entry, Foreign):
            self._foreign += 1
        elif isinstance(entry, ReplayNote):
            self._replayed |= {int(each, 16) for each in entry.ids} if entry.note == "done" else set()
        else:
            letter = entry.letter
            kind = self._kinds.setdefault((letter.code, letter.topic, letter.partition), len(self._kinds))
            place = (entry.at.partition, entry.offset)
            self._new.append((entry.number, *place, kind, letter.events, entry.written_ms))
            if entry.id not in self._newest:
                self._newest[entry.id] = {
                    "id": entry.id,
                    "place": entry.place,
                    "reason": letter.code,
                    "topic": letter.topic,
                    "partition": letter.partition,
                    "says": letter.reason[:_REASON],
                    "field": letter.field,
                    "events": letter.events,
                    "written_ms": entry.written_ms,
                }
                if len(self._newest) > 2 * _NEWEST:
                    self._keep_newest()

    def _keep_newest(self) -> None:
        kept = sorted(self._newest.values(), key=lambda each: each["written_ms"])[-_NEWEST:]
        self._newest = OrderedDict((each["id"], each) for each in kept)

    def _drop_before(self, begin: Positions) -> None:
        """Forget what retention has removed from the topic."""
        first = np.zeros(max((at.partition for at in begin), default=0) + 1, np.int64)
        for at, offset in begin.items():
            first[at.partition] = offset
        if len(self._rows) and (gone := self._rows["offset"] < first[self._rows["at"]]).any():
            self._rows = self._rows[~gone]
            numbers = set(self._rows["number"].tolist())
            self._newest = OrderedDict((i, each) for i, each in self._newest.items() if int(i, 16) in numbers)

    def place_of(self, letter_id: str) -> tuple[TopicPartition, int] | None:
        """Where in the dead-letter topic a letter is; None: not known."""
        rows = self._rows
        found = np.flatnonzero(rows["number"] == np.uint64(int(letter_id, 16)))
        if not len(found):
            return None
        row = rows[found[0]]
        return TopicPartition(DEAD_LETTERS, int(row["at"])), int(row["offset"])

    def was_replayed(self, letter_id: str) -> bool:
        """Whether a replay has appended its events again."""
        return int(letter_id, 16) in self._replayed

    def counts(self, chosen: Chosen, most: int) -> dict[str, Any]:
        """The letters that are meant, counted by what they have in common, and the newest of them.

        Args:
            chosen: Which.
            most: How many single letters.

        Returns:
            ``read`` of ``of`` records that the topic has are known.
        """
        with self._lock:
            return self._counts(chosen, most)

    def _counts(self, chosen: Chosen, most: int) -> dict[str, Any]:
        rows = self._rows
        kinds = [kind for kind, _ in sorted(self._kinds.items(), key=lambda item: item[1])]
        fits = np.array([_fits(kind, chosen) for kind in kinds], np.bool_)
        meant = fits[rows["kind"]] if len(rows) else np.zeros(0, np.bool_)
        if chosen.since_ms is not None:
            meant &= rows["ms"] >= chosen.since_ms
        if chosen.until_ms is not None:
            meant &= rows["ms"] < chosen.until_ms
        done = self._done()
        by_kind = {
            name: np.bincount(rows["kind"][which], weights, len(kinds)).astype(np.int64).tolist()
            for name, which, weights in (
                ("letters", meant, None),
                ("events", meant, rows["events"][meant].astype(np.float64)),
                ("replayed", meant & done, None),
            )
        }
        groups = [
            {"reason": kind[0], "topic": kind[1], "partition": kind[2], **{k: v[n] for k, v in by_kind.items()}}
            for n, kind in enumerate(kinds)
            if by_kind["letters"][n]
        ]
        newest = [each for each in self._newest.values() if _is_meant(each, chosen)]
        newest = sorted(newest, key=lambda each: each["written_ms"], reverse=True)[:most]
        return {
            "letters": int(meant.sum()),
            "events": int(rows["events"][meant].sum()),
            "replayed": int((meant & done).sum()),
            "groups": sorted(groups, key=lambda group: (-group["letters"], group["reason"])),
            "times": _bars(rows["ms"][meant]),
            "newest": [{**each, "replayed": self.was_replayed(each["id"])} for each in newest],
            "foreign": self._foreign,
            "read": self._read,
            "of": self._of,
        }

    def _done(self) -> Bool:
        if not self._replayed:
            return np.zeros(len(self._rows), np.bool_)
        return np.isin(self._rows["number"], np.fromiter(self._replayed, np.uint64, len(self._replayed)))


def read_letter(log: EventLog, at: TopicPartition, offset: int) -> StoredLetter | None:
    """One letter; None if it is no longer there.

    Raises:
        EventLogError, EventLogUnavailable: As the log raises them.
    """
    fetch = log.read({at: offset}, max_records=1, timeout_s=1.0)
    for record in fetch.records:
        if record.offset == offset and isinstance(entry := entry_of(record), StoredLetter):
            return entry
    return None


def _fits(kind: tuple[str, str, int], chosen: Chosen) -> bool:
    wanted = (chosen.reason, chosen.topic, chosen.partition)
    return all(want is None or want == got for want, got in zip(wanted, kind, strict=True))


def _is_meant(each: Mapping[str, Any], chosen: Chosen) -> bool:
    return (
        _fits((each["reason"], each["topic"], each["partition"]), chosen)
        and (chosen.since_ms is None or each["written_ms"] >= chosen.since_ms)
        and (chosen.until_ms is None or each["written_ms"] < chosen.until_ms)
    )


def _bars(written_ms: I64) -> dict[str, Any]:
    """How many were written in each stretch of time: minutes, hours or days, whichever gives at most 72 of them."""
    if not len(written_ms):
        return {"every_ms": _HOUR_MS, "from_ms": None, "letters": []}
    first, last = int(written_ms.min()), int(written_ms.max())
    steps = (60_000, 5 * 60_000, 15 * 60_000, _HOUR_MS, 6 * _HOUR_MS, _DAY_MS, 7 * _DAY_MS)
    every = next((step for step in steps if last // step - first // step < _MOST_BARS), 30 * _DAY_MS)
    start = first // every
    counts = np.bincount(written_ms // every - start)[-_MOST_BARS:]
    return {
        "every_ms": every,
        "from_ms": int((start + max(0, last // every - start + 1 - _MOST_BARS)) * every),
        "letters": counts.tolist(),
    }
