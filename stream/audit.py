"""The audit: the event log recounted from its ends, against the ledgers of a checkpoint.

The log is read from its beginning to its end, and so are the dead letters. What is counted there was written by others
than the trainer; the ledgers are the trainer's own. For every partition of both topics these equations must hold
(``A ≤ B`` where something is gone that only its counter knew):

``log``
    The checkpoint's position lies in the log, and it is the log that the checkpoint means.
``read``
    events read = events in the log from where reading began to the position. If retention has taken records from there
    since: from where an earlier audit ended (:mod:`stream.audit_marks`), or ``≥``, as where somebody deleted records.
``ledger``
    impressions read = emitted + waiting + late + duplicate; feedback read = attached + corrected + waiting + late +
    orphaned + duplicate; without those that were refused or dropped.
``waiting``
    events that wait, by the ledger = events that wait in the join's table.
``dead_letters``
    events refused = events of the letters on this partition from where reading began to the position, copies not
    counted. ``≥`` if letters were trimmed. An event from the future may have a letter and yet be accepted when it is
    read again after a restart: then there are more letters.

And for all partitions together:

``trained``
    impressions emitted, less those in batches not yet taken = trained + those of steps that were not finite.
``replayed``
    every letter that a note says was re-injected has a record that names it in the log.

What lies behind the position is unread: counted, and part of no equation.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from smes.arrays import Arrays
from smes.events import FIRST
from smes.schema import Schema
from stream.audit_marks import Mark, oldest_that_counts
from stream.audit_result import AuditResult, Equation, Imbalance, PartitionAudit
from stream.join.entries import EARLY, WAITING
from stream.join.ledgers import CORRECTED, DUPLICATE, HELD, LATE, ORPHANED, READ, USED
from stream.log.event_log import EventLog, Positions, TopicPartition
from stream.partition_state import saved_partitions, state_name
from stream.recount import LetterRecount, Progress, Recount, Recounter, Span, recount_letters
from stream.sources import Began, began_in, counted_in, lost_in, refused_in
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS


def audit(
    log: EventLog,
    schema: Schema,
    state: Arrays,
    *,
    trained: int,
    not_finite: int,
    old_schemas: Sequence[Schema] = (),
    marks: Sequence[Mark] = (),
    on_progress: Progress | None = None,
) -> AuditResult:
    """Recount the log against a state of the stream.

    Args:
        log: The event log.
        schema: That the events must fit.
        old_schemas: Of which events were read, too, before a change of the schema or during the change-over.
        state: Of the stream, as a checkpoint has it (:mod:`stream.partition_state`).
        trained: Impressions trained on, as the trainer counts them.
        not_finite: Impressions of steps that were not finite, likewise.
        marks: Where earlier audits have ended.
        on_progress: Told how many records were read so far.

    Raises:
        EventLogError, EventLogUnavailable: As the log raises them.
        KeyError: The state is not one of this version.
    """
    found = _Audit(log, [schema, *old_schemas], state, marks, on_progress or (lambda records: None))
    return found.run(trained, not_finite)


class _Audit:
    def __init__(
        self, log: EventLog, schemas: Sequence[Schema], state: Arrays, marks: Sequence[Mark], on_progress: Progress
    ) -> None:
        self._log, self._schemas, self._state, self._on_progress = log, schemas, state, on_progress
        self._imbalances: list[Imbalance] = []
        self._equations = 0
        self._notes: list[str] = []
        saved = [TopicPartition(topic, p) for topic in (IMPRESSIONS, FEEDBACK) for p in saved_partitions(state, topic)]
        self._saved = [s for s in saved if state_name(s.topic, s.partition, "position") in state]
        self._present = log.incarnations(IMPRESSIONS) | log.incarnations(FEEDBACK)
        begin = log.begin(IMPRESSIONS) | log.begin(FEEDBACK)
        self._ends_here = {source: self._mark(source) for source in self._saved}
        self._start = {source: self._recount_from(source, marks, begin.get(source, 0)) for source in self._saved}
        self._queued = Counter(
            {
                source: int(np.count_nonzero(self._array(source, "queued.kind") <= FIRST))
                for source in self._saved
                if source.topic == IMPRESSIONS
            }
        )

    def run(self, trained: int, not_finite: int) -> AuditResult:
        spans = {source: self._span(source) for source in sorted({*self._saved, *self._present})}
        letters = recount_letters(self._log, {source: spans[source] for source in self._saved})
        self._note_letters(letters)
        ends = self._log.end(IMPRESSIONS) | self._log.end(FEEDBACK)
        recounter = Recounter(self._log, self._schemas, letters.refused_schema, self._on_progress)
        partitions = []
        origins: set[int] = set()
        is_whole = True
        for source, span in spans.items():
            same_log = source in self._saved and self._check_log(source, span, ends)
            recount = recounter.recount(source, span, ends[source]) if source in self._present else Recount()
            origins |= recount.origins
            is_whole = is_whole and recount.begin == 0
            partitions.append(self._row(source, span, recount, letters, ends.get(source, 0)))
            if source in self._saved:
                self._check_ledger(source)
                self._check_waiting(source)
            if same_log:
                self._check_read(source, span, recount)
                self._check_letters(source, letters)
        self._check_trained(trained, not_finite)
        self._check_replayed(letters, origins, whole=is_whole)
        return AuditResult(
            partitions=partitions,
            imbalances=self._imbalances,
            equations=self._equations,
            notes=self._notes,
            letters=dict(sorted(letters.by_code.items())),
            letters_replayed=len(letters.replayed),
            trained=trained,
            not_finite=not_finite,
            marks=list(self._ends_here.values()),
        )

    def _note_letters(self, letters: LetterRecount) -> None:
        if letters.foreign:
            self._notes.append(f"{DEAD_LETTERS}: {letters.foreign:,} entries are neither letters nor notes")
        for partition, oldest in letters.trimmed.items():
            self._notes.append(
                f"{DEAD_LETTERS}/{partition}: letters before {oldest} were trimmed: not all are recounted"
            )

    # ---- what the checkpoint says

    def _array(self, source: TopicPartition, what: str) -> Any:
        return self._state[state_name(source.topic, source.partition, what)]

    def _span(self, source: TopicPartition) -> Span:
        """What the checkpoint has read; of a partition that it does not know, nothing."""
        if source not in self._saved:
            begin = self._log.begin(source.topic)[source]
            return Span("", begin, begin)
        incarnation = self._array(source, "incarnation").tobytes().decode(errors="replace")
        return Span(incarnation, self._start[source].position, int(self._array(source, "position")[0]))

    def _mark(self, source: TopicPartition) -> Mark:
        """Where the checkpoint is."""
        began, counted = began_in(self._state, source), counted_in(self._state, source)
        log = self._array(source, "incarnation").tobytes().decode(errors="replace")
        position = int(self._array(source, "position")[0])
        return Mark(source.topic, source.partition, log, began.position, position, *counted)

    def _recount_from(self, source: TopicPartition, marks: Sequence[Mark], begin: int) -> Began:
        """Where counting begins: where reading did, or if that is gone, where an earlier audit has ended."""
        began = began_in(self._state, source)
        mark = oldest_that_counts(marks, self._ends_here[source], begin) if begin > began.position else None
        return began if mark is None else Began(mark.position, mark.read, mark.dead_lettered, mark.gaps)

    def _row(
        self, source: TopicPartition, span: Span, recount: Recount, letters: LetterRecount, end: int
    ) -> PartitionAudit:
        if source not in self._saved:
            return PartitionAudit(
                topic=source.topic,
                partition=source.partition,
                begin=recount.begin,
                position=recount.begin,
                end=end,
                appended=recount.unread,
                unread=recount.unread,
                reinjected=len(recount.origins),
            )
        ledger, refused = self._array(source, "ledger").tolist(), refused_in(self._state, source)
        counted, lost, queued = counted_in(self._state, source), lost_in(self._state, source), self._queued[source]
        return PartitionAudit(
            topic=source.topic,
            partition=source.partition,
            begin=recount.begin,
            position=span.position,
            end=end,
            appended=counted.read + recount.unread,
            read=counted.read,
            recounted=recount.read,
            trained=ledger[USED] + ledger[CORRECTED] - queued,
            waiting=ledger[HELD] + queued,
            late=ledger[LATE],
            duplicate=ledger[DUPLICATE],
            orphaned=ledger[ORPHANED],
            dead_lettered=counted.dead_lettered,
            dropped=refused.dropped,
            unread=recount.unread,
            trimmed_read=max(0, min(recount.begin, span.position) - began_in(self._state, source).position),
            trimmed_unread=lost.trimmed + max(0, recount.begin - span.position),
            logs_replaced=lost.replaced,
            gaps=counted.gaps,
            unreadable=refused.unreadable,
            letters=letters.spans[source].all,
            reinjected=len(recount.origins),
        )

    # ---- whether it fits

    def _check_log(self, source: TopicPartition, span: Span, ends: Positions) -> bool:
        """Whether the checkpoint and the log can be compared at all."""
        position, was, now = span.position, span.log, self._present.get(source)
        if now is None:
            self._expect("log", source, False, "the checkpoint has read this partition, and the log does not have it")
            return False
        if was not in ("", now):
            self._expect("log", source, False, f"the checkpoint means log {was}, and this is log {now}")
            return False
        begin, end = self._log.begin(source.topic)[source], ends[source]
        if position < begin:
            lost = begin - position
            what = f"{lost:,} records were trimmed unread, offsets {position} … {begin - 1}"
            self._expect("log", source, False, what, position=position, begin=begin, trimmed_unread=lost)
        elif position > end:
            what = f"the position {position} lies behind the log's end {end}: the log has lost what was read last"
            self._expect("log", source, False, what, position=position, end=end)
        else:
            self._equations += 1
        return begin <= position <= end

    def _check_read(self, source: TopicPartition, span: Span, recount: Recount) -> None:
        began, counted = self._start[source], counted_in(self._state, source)
        read, gone = counted.read - began.read, max(0, recount.begin - began.position)
        deleted = max(0, recount.gaps - (counted.gaps - began.gaps))
        since = f"offsets {max(began.position, recount.begin)} … {span.position - 1}"
        what = f"{read:,} read, but {recount.read:,} are in the log at {since}"
        if gone or deleted:
            self._notes.append(
                f"{source.topic}/{source.partition}: {gone:,} offsets were trimmed and {deleted:,} records deleted "
                f"after they were read: {read - recount.read:,} of {read:,} events cannot be recounted"
            )
        holds = recount.read <= read if gone or deleted else recount.read == read
        numbers = {"read": read, "recounted": recount.read, "trimmed_read": gone, "deleted_read": deleted}
        self._expect("read", source, holds, what, **numbers)

    def _check_ledger(self, source: TopicPartition) -> None:
        ledger = self._array(source, "ledger").tolist()
        parts = {
            "used": ledger[USED],
            "waiting": ledger[HELD],
            "late": ledger[LATE],
            "duplicate": ledger[DUPLICATE],
            "orphaned": ledger[ORPHANED],
            "corrected": ledger[CORRECTED],
        }
        told = " + ".join(f"{count:,} {name}" for name, count in parts.items())
        what = f"{ledger[READ]:,} joined, but {told} = {sum(parts.values()):,}"
        self._expect("ledger", source, ledger[READ] == sum(parts.values()), what, joined=ledger[READ], **parts)

    def _check_waiting(self, source: TopicPartition) -> None:
        held, found = int(self._array(source, "ledger")[HELD]), self._waiting_in_table(source)
        what = f"{held:,} wait by the ledger, but {found:,} in the join's table"
        self._expect("waiting", source, held == found, what, ledger=held, table=found)

    def _waiting_in_table(self, source: TopicPartition) -> int:
        if source.topic == IMPRESSIONS:
            status, stage = self._array(source, "entry.status"), self._array(source, "entry.stage")
            return int(np.count_nonzero((status == WAITING) & (stage == 0)))
        count = 0
        for each in self._saved:
            if each.topic != FEEDBACK:
                continue
            attached = self._array(each, "entry.attached")[self._array(each, "entry.status") == EARLY]
            held_by = self._array(each, "entry.label_partition")[self._array(each, "entry.status") == EARLY]
            bits = np.uint64(1) << np.arange(held_by.shape[1], dtype=np.uint64)
            count += int(np.count_nonzero(((attached[:, None] & bits) != 0) & (held_by == source.partition)))
        return count

    def _check_letters(self, source: TopicPartition, letters: LetterRecount) -> None:
        began, counted, found = self._start[source], counted_in(self._state, source), letters.spans[source]
        dead = counted.dead_lettered - began.dead_lettered
        what = f"{dead:,} events dead-lettered, but the letters there are stand for {found.all:,}"
        holds = found.sure <= dead and (dead <= found.all or bool(letters.trimmed))
        numbers = {"dead_lettered": dead, "letters": found.all, "of_them_by_the_clock": found.by_the_clock}
        self._expect("dead_letters", source, holds, what, **numbers)

    def _check_trained(self, trained: int, not_finite: int) -> None:
        emitted = sum(int(self._array(s, "ledger")[USED]) for s in self._saved if s.topic == IMPRESSIONS)
        queued = self._queued.total()
        what = (
            f"{emitted:,} impressions emitted, less {queued:,} in batches not yet taken = {emitted - queued:,}, but "
            f"{trained:,} trained + {not_finite:,} not finite = {trained + not_finite:,}"
        )
        numbers = {"emitted": emitted, "queued": queued, "trained": trained, "not_finite": not_finite}
        self._expect("trained", None, emitted - queued == trained + not_finite, what, **numbers)

    def _check_replayed(self, letters: LetterRecount, origins: set[int], *, whole: bool) -> None:
        here = letters.replayed & letters.here
        missing = len(here - origins)
        if missing and not whole:
            self._notes.append(f"{missing:,} letters were re-injected whose records may have been trimmed since")
            return
        what = f"{len(here):,} letters were re-injected, but {missing:,} of them have no record in the log"
        self._expect("replayed", None, not missing, what, noted=len(here), missing=missing)

    def _expect(
        self, equation: Equation, source: TopicPartition | None, holds: bool, message: str, **numbers: int
    ) -> None:
        self._equations += 1
        if not holds:
            topic, partition = (None, None) if source is None else (source.topic, source.partition)
            self._imbalances.append(Imbalance(equation, topic, partition, message, numbers))
