"""Appending the events of dead letters again, after what refused them was fixed. Nothing is learned twice.

Two things see to that, and each would be enough in the ordinary case:

**The join.** An impression id counts once, and so does feedback of one task on it, in whatever partition and however
late a second copy comes: while the id is remembered the copy is a duplicate, and afterwards it is late or orphaned
(:mod:`stream.join.joiner`). So a copy in the log is counted and never trained on, whoever appended it.

**Notes**, so that a second replay appends nothing at all. They lie in the dead-letter topic, behind the letters of the
same partition, so that retention takes a letter before the note on it. A replay goes block by block::

    1. note "begun": the letters' ids, and where the topics end now
    2. the events, each with the header ``dead-letter``: the id of its letter
    3. note "done": the letters' ids

A replay that dies between 1 and 3 has appended some of the block's events, or none. The next one looks for them: it
reads the topics from the ends that the note names, and what it finds there by its header is done. The others are
appended. If retention has taken those records by then, the events are appended again, and the join drops the copies.
The same happens to what the log itself appends twice after a lost acknowledgement, and to two replays at a time.

An event is checked before it is appended: what would be refused again stays a letter. What the letter holds only a part
of is taken from the log, if the record is still there.
"""

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from smes.arrays import I32, I64, Arrays, Bool
from smes.errors import PositionOutOfRange
from smes.events import DROPPED, FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from smes.schema_change import SchemaChange
from smes_io.clock import wall_clock_ms
from stream.codec.codec import decode, headers
from stream.codec.single import single_event
from stream.dead_letter_reading import (
    ALL_LETTERS,
    LetterFilter,
    ReplayNote,
    StoredLetter,
    read_entries,
    topic_bounds,
)
from stream.log.event_log import EventLog, Headers, OutRecord, Positions, Record, TopicPartition
from stream.partition_state import state_name
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS

_logger = logging.getLogger(__name__)

ORIGIN = "dead-letter"
"""Header of a re-injected record: the id of the letter that it was made of."""

_BLOCK_LETTERS, _BLOCK_BYTES = 500, 4 * 1024 * 1024
_RECORDS_PER_READ = 2000

NO_EVENT = "no event: what was there is no record, or an example of a training step"
GONE = "the letter holds only a part of it, and the record is no longer in the log"

TooLate = Callable[[ImpressionBlock, FeedbackBlock], int]
"""How many of these events would come too late to be learned from."""


@dataclass(slots=True)
class ReplayOutcome:
    """What became of the letters that were chosen. Copies of a letter are one; ``chosen`` is the sum of the others.

    Attributes:
        chosen: Letters that the filter matches.
        appended: Their records are in the log now; with a dry run: would be.
        replayed_before: Nothing was done, because a replay has done so before.
        found: Appended by a replay that died before it said so.
        refused: By code: would be refused again.
        impossible: By why: letters that no record can be made of.
        events: Events in the appended records.
        too_late: How many of these come too late to be learned from; None where that is not known.
    """

    chosen: int = 0
    appended: int = 0
    replayed_before: int = 0
    found: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    impossible: Counter[str] = field(default_factory=Counter)
    events: int = 0
    too_late: int | None = None


class Replayer:
    """Re-injects dead letters.

    Args:
        log: With the dead letters and both topics of events.
        schema: What the events must fit.
        changes, max_future_ms: As :func:`stream.codec.codec.decode`.
        adopt_schema: Take the events for those of ``schema``, whatever schema their headers name.
        too_late: Says which events would not be learned from; None: nobody knows.
        now_ms: The reader's clock, Unix milliseconds.
    """

    def __init__(
        self,
        log: EventLog,
        schema: Schema,
        *,
        changes: Sequence[SchemaChange] = (),
        max_future_ms: int = 300_000,
        adopt_schema: bool = False,
        too_late: TooLate | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._log, self._schema, self._max_future_ms, self._now_ms = log, schema, max_future_ms, now_ms
        self._changes, self._adopt_schema, self._too_late = changes, adopt_schema, too_late
        self._incarnations: dict[TopicPartition, str] = {}
        self._run = uuid.uuid4().hex[:12]

    def run(
        self,
        chosen: LetterFilter = ALL_LETTERS,
        *,
        dry_run: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int], None] = lambda letters: None,
    ) -> ReplayOutcome:
        """Append the events of the letters that match and were not replayed yet.

        Letters that are written meanwhile are left alone.

        Args:
            chosen: Which letters.
            dry_run: Append nothing; say what would be.
            should_stop: Asked between two blocks.
            on_progress: Told, after each block, how many letters were chosen so far.

        Raises:
            EventLogError, EventLogUnavailable: As the log raises them. What was appended so far is noted, or will be
                found by the next replay.
        """
        until = topic_bounds(self._log)[1]
        outcome = ReplayOutcome(too_late=None if self._too_late is None else 0)
        done, begun = read_notes(self._log, until)
        interrupted = [note for note in begun if not {int(each, 16) for each in note.ids} <= done]
        found = self._find_appended(interrupted, done, dry_run=dry_run) if interrupted else set()
        if until:
            self._incarnations = self._log.incarnations(IMPRESSIONS) | self._log.incarnations(FEEDBACK)
        for block in self._blocks(chosen, until, done, found, outcome):
            self._replay_block(block, outcome, dry_run=dry_run)
            on_progress(outcome.chosen)
            if should_stop():
                break
        return outcome

    def _blocks(
        self, chosen: LetterFilter, until: Positions, done: set[int], found: set[int], outcome: ReplayOutcome
    ) -> Iterator[list[StoredLetter]]:
        """The letters to replay, each once, in blocks of one partition of the dead-letter topic."""
        seen: set[int] = set()
        block: list[StoredLetter] = []
        size = 0
        for entry in read_entries(self._log, until):
            if not isinstance(entry, StoredLetter) or entry.number in seen or not chosen.matches(entry):
                continue
            seen.add(entry.number)
            outcome.chosen += 1
            outcome.found += entry.number in found
            outcome.replayed_before += entry.number in done and entry.number not in found
            if entry.number in done or entry.number in found:
                continue
            if block and (entry.at != block[0].at or len(block) >= _BLOCK_LETTERS or size >= _BLOCK_BYTES):
                yield block
                block, size = [], 0
            block.append(entry)
            size += entry.payload_bytes
        if block:
            yield block

    def _replay_block(self, letters: Sequence[StoredLetter], outcome: ReplayOutcome, *, dry_run: bool) -> None:
        good = self._acceptable(letters, outcome)
        if good and not dry_run:
            at, ids = letters[0].at, tuple(stored.id for stored, _ in good)
            ends = self._log.end(IMPRESSIONS) | self._log.end(FEEDBACK)
            self._note(ReplayNote("begun", self._run, ids, ends, at))
            for topic in (IMPRESSIONS, FEEDBACK):  # impressions first: feedback need not wait for them
                records = [record for stored, record in good if stored.letter.topic == topic]
                if records:
                    self._log.append(topic, records)
            self._note(ReplayNote("done", self._run, ids, {}, at))
        outcome.appended += len(good)

    def _acceptable(
        self, letters: Sequence[StoredLetter], outcome: ReplayOutcome
    ) -> list[tuple[StoredLetter, OutRecord]]:
        """The letters whose events would not be refused again, with their records."""
        made: list[tuple[StoredLetter, OutRecord]] = []
        for stored in letters:
            record = self._record_of(stored)
            if isinstance(record, str):
                outcome.impossible[record] += 1
            else:
                made.append((stored, record))
        now_ms = self._now_ms()
        # Decoded as they would be read, with their numbers here as offsets.
        tried = [
            Record(stored.letter.topic, record.partition, i, record.value, record.headers, now_ms)
            for i, (stored, record) in enumerate(made)
        ]
        decoded = decode(tried, self._schema, changes=self._changes, max_future_ms=self._max_future_ms, now_ms=now_ms)
        events = np.bincount(decoded.impressions.offset, minlength=len(made))
        dropped = decoded.feedback.task == DROPPED
        events += np.bincount(decoded.feedback.offset[~dropped], minlength=len(made))
        problems = {letter.offset: letter.code for letter in decoded.dead}
        without = "dropped_task" if dropped.any() else "unparsable"
        for i in np.flatnonzero(events == 0).tolist():
            outcome.refused[problems.get(i, without)] += 1
        outcome.events += int(events.sum())
        if self._too_late is not None:
            outcome.too_late = (outcome.too_late or 0) + self._too_late(decoded.impressions, decoded.feedback)
        return [each for each, count in zip(made, events.tolist(), strict=True) if count]

    def _record_of(self, stored: StoredLetter) -> OutRecord | str:
        """The record to append; or why there is none."""
        letter = stored.letter
        if letter.offset < 0 or letter.code == "unreadable" or letter.topic not in (IMPRESSIONS, FEEDBACK):
            return NO_EVENT
        value, head = letter.payload, letter.headers
        if letter.row is not None:
            head = headers("json", self._schema) if self._adopt_schema else _as_json(head)
        if not stored.is_whole or head is None:
            original = self._original(stored)
            if original is None:
                return GONE
            value, head = original.value, original.headers
            if letter.row is not None:
                try:
                    value = single_event(original, letter.row)
                except ValueError as error:
                    return f"its record cannot be taken apart: {error}"
        if self._adopt_schema:
            head = _with_schema(head, self._schema)
        partition = min(letter.partition, self._log.partitions(letter.topic) - 1)
        origin = (ORIGIN, stored.id.encode())
        return OutRecord(value, (*(each for each in head if each[0] != ORIGIN), origin), partition)

    def _original(self, stored: StoredLetter) -> Record | None:
        """The record that the letter is about, if it is still in the log."""
        letter = stored.letter
        source = TopicPartition(letter.topic, letter.partition)
        if not stored.log or self._incarnations.get(source) != stored.log:
            return None
        try:
            fetch = self._log.read({source: letter.offset}, max_records=1, timeout_s=1.0)
        except PositionOutOfRange:
            return None
        record = next((record for record in fetch.records if record.offset == letter.offset), None)
        if record is not None and letter.row is None and not record.value.startswith(letter.payload):
            return None
        return record

    def _find_appended(self, interrupted: Sequence[ReplayNote], done: set[int], *, dry_run: bool) -> set[int]:
        """Which letters of interrupted replays have their records in the log, by number; they are noted as done."""
        start: Positions = {}
        for note in interrupted:
            for source, end in note.ends.items():
                start[source] = min(end, start.get(source, end))
        origins = set(read_origins(self._log, start))
        found: set[int] = set()
        for note in interrupted:
            ids = tuple(each for each in note.ids if each in origins and int(each, 16) not in done)
            if ids and not dry_run:
                self._note(replace(note, note="done", ids=ids, ends={}))
            found |= {int(each, 16) for each in ids}
            _logger.warning(
                "replay %s was interrupted: of the %d letters that it was about to append, %d are in the log",
                note.run,
                len(note.ids),
                len(ids),
            )
        return found

    def _note(self, note: ReplayNote) -> None:
        self._log.append(DEAD_LETTERS, [note.to_record()])


def read_notes(log: EventLog, until: Positions | None = None) -> tuple[set[int], list[ReplayNote]]:
    """The numbers of the letters that were replayed, and the notes on replays that had begun."""
    done: set[int] = set()
    begun: list[ReplayNote] = []
    for entry in read_entries(log, until):
        if isinstance(entry, ReplayNote) and entry.note == "done":
            done |= {int(each, 16) for each in entry.ids}
        elif isinstance(entry, ReplayNote):
            begun.append(entry)
    return done, begun


def read_origins(log: EventLog, start: Positions) -> Iterator[str]:
    """The letters that records of the topics of events were made of, from these positions to the present end."""
    for source, first in sorted(start.items()):
        position, end = max(first, log.begin(source.topic)[source]), log.end(source.topic)[source]
        while position < end:
            fetch = log.read({source: position}, max_records=_RECORDS_PER_READ, timeout_s=1.0)
            position = fetch.positions[source]
            for record in fetch.records:
                origin = origin_of(record.headers)
                if origin is not None:
                    yield origin


def origin_of(record_headers: Headers) -> str | None:
    """The id of the letter that a record was made of; None for most records."""
    for name, value in record_headers:
        if name == ORIGIN:
            return value.decode("ascii", "replace")
    return None


def too_late_by(schema: Schema, state: Arrays, lateness_ms: int) -> TooLate:
    """Judges by a state of the stream which events a trainer that goes on from there would not learn from.

    Args:
        schema: Its tasks' windows.
        state: As a checkpoint has it (:mod:`stream.partition_state`).
        lateness_ms: ``allowed_lateness_s``, milliseconds.
    """
    window_ms = max(task.window_ms for task in schema.tasks)
    floor_ms = int(state["watermark_ms"][0])

    def watermark_of(topic: str, partition: int) -> int:
        vouched_ms = state.get(state_name(topic, partition, "vouched_ms"))
        return floor_ms if vouched_ms is None else max(floor_ms, int(vouched_ms[0]) - lateness_ms)

    def passed(topic: str, partition: I32, last_ms: I64) -> Bool:
        watermarks = {p: watermark_of(topic, p) for p in set(partition.tolist())}
        late: Bool = last_ms < np.array([watermarks[p] for p in partition.tolist()], np.int64)
        return late

    def count(impressions: ImpressionBlock, feedback: FeedbackBlock) -> int:
        late = passed(IMPRESSIONS, impressions.partition, impressions.event_time_ms + window_ms)
        # Feedback belongs to an impression that happened at most the allowed lateness after it.
        last_ms = feedback.event_time_ms + lateness_ms + window_ms
        return int(late.sum() + passed(FEEDBACK, feedback.partition, last_ms).sum())

    return count


def _as_json(head: Headers | None) -> Headers | None:
    """The headers of a row's record, for the row as JSON."""
    if head is None:
        return None
    return tuple((name, b"json" if name == "codec" else value) for name, value in head)


def _with_schema(head: Headers, schema: Schema) -> Headers:
    others = tuple(each for each in head if each[0] != "schema")
    return (*others, ("schema", schema.hash.encode()))
