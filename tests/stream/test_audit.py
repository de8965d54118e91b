"""The audit: in memory, on a real Valkey and on a real Kafka.

Guarantee shown: whatever the log went through, the recount balances while nothing was lost and nothing was counted
wrongly; every kind of loss, and every wrong count, is named with its equation, its place and its numbers.
"""

from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

from smes.errors import PositionOutOfRange
from stream.audit import audit
from stream.audit_marks import Mark, oldest_that_counts, read_marks, write_marks
from stream.audit_result import AuditResult
from stream.codec.codec import decode
from stream.config import JoinConfig
from stream.dead_letter_replay import Replayer
from stream.dead_letters import DeadLetterWriter
from stream.join.ledgers import HELD, LATE, READ, USED
from stream.log.event_log import EventLog, Fetch, OutRecord, TopicPartition
from stream.log.memory_log import InMemoryLog
from stream.recount import Recounter, Span
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS
from tests.stream.refused_events import (
    CONFIG,
    ONE_TASK,
    SCHEMA,
    START_MS,
    Reader,
    World,
    append_good,
    feedback,
    impression,
    with_headers,
)

SHOWN = TopicPartition(IMPRESSIONS, 1)


def append_everything(log: EventLog) -> None:
    """Good events in both forms, and some of every kind of trouble."""
    append_good(log, range(1000))
    append_good(log, range(1000, 2000), "arrow")
    late = [impression(i, event_time_ms=START_MS + i) for i in range(3000, 3010)]
    again = [impression(i) for i in range(1990, 2000)]
    bad = [impression(i, item_id="x") for i in range(4000, 4007)]
    log.append(IMPRESSIONS, [*late, *again, *bad])
    early = [feedback(i, event_time_ms=START_MS + 199_000) for i in range(5000, 5020)]
    log.append(FEEDBACK, [*early, feedback(1998, "wink"), feedback(1998, value=7), feedback(10, "like")])


def test_what_was_appended_is_accounted_for_event_by_event(world: World) -> None:
    append_everything(world.log)
    reader = Reader(world.log)
    reader.read_all()
    state = reader.state()
    append_good(world.log, range(2000, 2100))

    result = reader.audit(state)

    assert result.imbalances == []
    assert result.balanced
    assert result.notes == []
    assert result.equations == 4 * 5 + 2
    names = ["appended", "read", "recounted", "trained", "waiting", "late", "duplicate", "orphaned", "dead_lettered"]
    names += ["letters", "unread"]
    total = {
        topic: {n: sum(getattr(each, n) for each in result.partitions if each.topic == topic) for n in names}
        for topic in (IMPRESSIONS, FEEDBACK)
    }
    shown, clicked = total[IMPRESSIONS], total[FEEDBACK]
    assert (shown["appended"], shown["read"], shown["recounted"], shown["unread"]) == (2127, 2027, 2027, 100)
    assert (shown["late"], shown["duplicate"], shown["dead_lettered"], shown["letters"]) == (10, 10, 7, 7)
    assert shown["trained"] == len(reader.labels) > 1000
    assert shown["trained"] + shown["waiting"] == 2000
    assert (clicked["appended"], clicked["read"], clicked["unread"]) == (1000 + 23 + 50, 1023, 50)
    assert (clicked["dead_lettered"], clicked["late"], clicked["trained"], clicked["waiting"]) == (2, 1, 1000, 20)
    assert result.letters == {"bad_id": 7, "label_range": 1, "unknown_task": 1}


def test_every_moment_of_a_stream_balances(log: InMemoryLog) -> None:
    """A checkpoint may be of any moment, and a trainer that restarts from it writes letters again."""
    append_everything(log)
    random = Random(5)
    for _ in range(6):
        reader = Reader(log)
        state = reader.state()
        trained = 0
        for _ in range(random.randint(1, 12)):
            reader.stream.poll(0)
            while random.random() < 0.8 and (batch := reader.stream.next_batch()) is not None:
                reader.trained += batch.num_impressions
            state, trained = reader.state(), reader.trained
        result = reader.audit(state)
        assert result.imbalances == []
        assert sum(each.trained for each in result.partitions if each.topic == IMPRESSIONS) == trained


def test_delayed_feedback_balances(log: InMemoryLog) -> None:
    append_good(log, range(100))
    log.append(FEEDBACK, [feedback(i, "like", event_time_ms=START_MS + 100 * i + 30_000) for i in range(0, 100, 5)])
    append_good(log, range(1000, 1200))
    config = replace(CONFIG, join=JoinConfig(allowed_lateness_s=0, wait={"default": "immediate", "click": 10.0}))
    reader = Reader(log, config=config)
    end = reader.stream.end()
    while not reader.stream.has_reached(end):
        reader.stream.poll(0)
        while (batch := reader.stream.next_batch()) is not None:
            reader.trained += batch.num_impressions
        result = reader.audit()
        assert result.imbalances == []
    assert reader.stream.ledger().corrected == 20
    assert sum(each.trained for each in result.partitions if each.topic == FEEDBACK) == 50 + 20 + 100


def equations(result: AuditResult) -> set[tuple[str, str | None, int | None]]:
    return {(each.equation, each.topic, each.partition) for each in result.imbalances}


@pytest.mark.parametrize("column", [READ, LATE, USED, HELD], ids=["read", "late", "used", "held"])
def test_one_event_too_many_in_a_ledger_is_found(log: InMemoryLog, column: int) -> None:
    append_everything(log)
    reader = Reader(log)
    reader.read_all()
    state = reader.state()
    state[f"{SHOWN.topic}/{SHOWN.partition}/ledger"][column] += 1

    found = equations(reader.audit(state))

    assert ("ledger", *_of(SHOWN)) in found
    assert {(topic, partition) for _, topic, partition in found} <= {_of(SHOWN), (None, None)}


def test_wrong_counts_that_balance_among_themselves_are_found_by_the_recount(log: InMemoryLog) -> None:
    append_everything(log)
    reader = Reader(log)
    reader.read_all()

    def found(*changes: tuple[int, int]) -> set[tuple[str, str | None, int | None]]:
        state = reader.state()
        for column, change in changes:
            state[f"{SHOWN.topic}/{SHOWN.partition}/ledger"][column] += change
        return equations(reader.audit(state))

    assert found((READ, 1), (LATE, 1)) == {("read", *_of(SHOWN))}  # an event that is not in the log
    assert found((READ, -1), (LATE, -1)) == {("read", *_of(SHOWN))}
    assert found((HELD, -1), (LATE, 1)) == {("waiting", *_of(SHOWN))}  # an event that is in no table
    assert found((USED, -1), (LATE, 1)) == {("trained", None, None)}  # an example that nobody emitted
    assert found() == set()


def _of(source: TopicPartition) -> tuple[str, int]:
    return source.topic, source.partition


def test_a_letter_that_is_missing_and_one_too_many_are_found(log: InMemoryLog) -> None:
    append_everything(log)
    reader = Reader(log)
    reader.read_all()
    state = reader.state()
    at = TopicPartition(DEAD_LETTERS, 0)
    log.delete(at, 1)

    [missing] = reader.audit(state).imbalances
    assert (missing.equation, missing.numbers["dead_lettered"] - missing.numbers["letters"]) == ("dead_letters", 1)
    assert str(missing).startswith(f"dead_letters: {missing.topic}/{missing.partition}: ")
    assert f"{missing.numbers['dead_lettered']:,} events dead-lettered" in str(missing)

    # A letter on an event that the ledger says is good.
    [good] = log.read({SHOWN: 0}, max_records=1, timeout_s=0).records
    [letter] = decode([replace(good, value=b"{}")], SCHEMA).dead
    DeadLetterWriter(log).write([letter])
    found = reader.audit(state).imbalances
    assert {(each.topic, each.partition) for each in found} == {(missing.topic, missing.partition), _of(SHOWN)}


def test_records_trimmed_unread_are_a_loss_with_its_number(world: World) -> None:
    append_good(world.log, range(400))
    reader = Reader(world.log)
    state = reader.state()
    world.trim(SHOWN, 30)

    result = reader.audit(state)

    [loss] = result.imbalances
    assert (loss.equation, loss.topic, loss.partition) == ("log", *_of(SHOWN))
    assert loss.numbers == {"position": 0, "begin": 30, "trimmed_unread": 30}
    assert next(each for each in result.partitions if (each.topic, each.partition) == _of(SHOWN)).trimmed_unread == 30

    # Once somebody has told the trainer to go on without them, they are a number, and everything else balances.
    with pytest.raises(PositionOutOfRange):
        reader.read_all()
    reader.stream.skip_lost()
    reader.read_all()
    result = reader.audit()
    assert result.balanced, result.imbalances
    assert next(each for each in result.partitions if (each.topic, each.partition) == _of(SHOWN)).trimmed_unread == 30
    assert sum(each.trimmed_unread for each in result.partitions) == 30


def test_records_trimmed_after_they_were_read_are_no_loss_and_the_rest_is_still_checked(world: World) -> None:
    append_everything(world.log)
    reader = Reader(world.log)
    reader.read_all()
    world.trim(SHOWN, 100)

    result = reader.audit()

    assert result.balanced, result.imbalances
    row = next(each for each in result.partitions if (each.topic, each.partition) == _of(SHOWN))
    assert (row.trimmed_read, row.trimmed_unread, row.read - row.recounted) == (100, 0, 100)
    assert result.notes == [
        f"impressions/1: 100 offsets were trimmed and 0 records deleted after they were read: 100 of {row.read:,} "
        "events cannot be recounted"
    ]
    state = reader.state()
    state[f"{IMPRESSIONS}/1/ledger"][[READ, USED]] -= 101  # fewer than are there
    assert ("read", *_of(SHOWN)) in equations(reader.audit(state))


def test_audits_that_follow_each_other_leave_nothing_unchecked_where_retention_takes_what_was_read(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "marks"
    reader = Reader(world.log)
    for i in range(3):
        append_good(world.log, range(400 * i, 400 * i + 400))
        world.log.append(IMPRESSIONS, [impression(10**6 + i, item_id="x")])
        reader.read_all()
        marks = read_marks(path)
        result = audit(world.log, SCHEMA, reader.state(), trained=reader.trained, not_finite=0, marks=marks)
        assert (result.balanced, result.notes) == (True, [])
        write_marks(path, [*marks, *result.marks])
        for at, end in world.log.end(IMPRESSIONS).items():
            world.trim(at, end - 20)

    # Without the marks, one side only: an event that is not in the log would not be found.
    append_good(world.log, range(2000, 2100))
    reader.read_all()
    state = reader.state()
    state[f"{IMPRESSIONS}/1/ledger"][[READ, LATE]] += 1
    assert reader.audit(state).balanced
    found = audit(world.log, SCHEMA, state, trained=reader.trained, not_finite=0, marks=read_marks(path))
    assert equations(found) == {("read", *_of(SHOWN))}
    [wrong] = found.imbalances
    assert wrong.numbers["read"] == wrong.numbers["recounted"] + 1 < 150


def test_a_file_of_marks_keeps_the_newest_and_names_a_line_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "marks"
    assert read_marks(path) == []
    marks = [Mark(IMPRESSIONS, p, "a", 0, i, i, 0, 0) for i in range(150) for p in (0, 1)]
    write_marks(path, marks)
    assert sorted(read_marks(path), key=lambda mark: mark.position) == marks[-200:]
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match="line 201: expected a mark of an audit"):
        read_marks(path)
    here = Mark(IMPRESSIONS, 0, "a", 0, 120, 0, 0, 0)
    assert oldest_that_counts(marks, here, 30) == marks[60]
    assert oldest_that_counts(marks, here, 121) is None
    others = [replace_mark(here, log="b"), replace_mark(here, began=1), replace_mark(here, partition=2)]
    assert all(oldest_that_counts(marks, other, 30) is None for other in others)


def replace_mark(mark: Mark, **changes: object) -> Mark:
    return msgspec.structs.replace(mark, **changes)


def test_deleted_and_unreadable_records_balance(log: InMemoryLog) -> None:
    append_good(log, range(400))
    log.delete(SHOWN, 7)
    log.append_unreadable(SHOWN, b"other")
    reader = Reader(log)
    reader.read_all()

    result = reader.audit()

    assert (result.balanced, result.notes) == (True, [])
    row = next(each for each in result.partitions if (each.topic, each.partition) == _of(SHOWN))
    assert (row.gaps, row.unreadable, row.dead_lettered, row.letters) == (1, 1, 1, 1)
    log.delete(SHOWN, 8)  # one that was read
    result = reader.audit()
    assert result.balanced
    assert "0 offsets were trimmed and 1 records deleted after they were read: 1 of" in result.notes[0]


def test_another_log_of_the_same_name_is_named_and_balances_once_it_was_accepted(log: InMemoryLog) -> None:
    append_everything(log)
    reader = Reader(log)
    reader.read_all()
    state = reader.state()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.make_anew(topic)
    append_good(log, range(6000, 6100))
    log.append(IMPRESSIONS, [impression(6200, item_id=None)])

    assert equations(reader.audit(state)) == {("log", t, p) for t in (IMPRESSIONS, FEEDBACK) for p in (0, 1)}

    after = Reader(log)
    after.labels, after.trained = reader.labels, reader.trained
    after.stream.load_state(state)
    after.stream.skip_lost()
    after.read_all()
    result = after.audit()
    assert result.balanced, result.imbalances
    assert {each.logs_replaced for each in result.partitions} == {1}
    assert sum(each.read for each in result.partitions if each.topic == IMPRESSIONS) == 2027 + 101
    assert sum(each.recounted for each in result.partitions if each.topic == IMPRESSIONS) == 101
    # It is still so after a restart.
    restarted = Reader(log)
    restarted.stream.load_state(after.state())
    assert {name: a.tolist() for name, a in restarted.state().items() if name.endswith(("/began", "/lost"))} == {
        name: a.tolist() for name, a in after.state().items() if name.endswith(("/began", "/lost"))
    }


def test_a_log_that_lost_its_newest_records_is_named(log: InMemoryLog) -> None:
    append_good(log, range(400))
    reader = Reader(log)
    reader.read_all()
    log.set_end(SHOWN, 50)

    [lost] = reader.audit().imbalances

    assert (lost.equation, lost.topic, lost.partition, lost.numbers["end"]) == ("log", *_of(SHOWN), 50)


def test_partitions_that_were_added_are_unread_and_then_read(log: InMemoryLog) -> None:
    append_good(log, range(100))
    reader = Reader(log)
    reader.read_all()
    state = reader.state()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.add_partitions(topic, 3)
    log.append(IMPRESSIONS, [OutRecord(impression(i).value, (), 2) for i in range(200, 220)])

    result = reader.audit(state)

    assert result.balanced
    row = next(each for each in result.partitions if (each.topic, each.partition) == (IMPRESSIONS, 2))
    assert (row.appended, row.read, row.unread) == (20, 0, 20)
    reader.read_all()
    assert reader.audit().balanced


def test_a_replay_whose_records_are_not_in_the_log_is_found(log: InMemoryLog) -> None:
    append_good(log, range(100))
    log.append(IMPRESSIONS, [with_headers(impression(50, event_time_ms=START_MS + 9000), ONE_TASK)])
    reader = Reader(log)
    reader.read_all()
    Replayer(log, SCHEMA, adopt_schema=True).run()
    reader.read_all()
    result = reader.audit()
    assert result.balanced, result.imbalances
    reinjected = next(each for each in result.partitions if each.reinjected)
    at = TopicPartition(reinjected.topic, reinjected.partition)

    log.delete(at, log.end(IMPRESSIONS)[at] - 1)

    assert ("replayed", None, None) in equations(reader.audit())


def test_an_event_from_the_future_may_be_refused_and_accepted_later(log: InMemoryLog) -> None:
    """A trainer restarts after the event's time has come: the letter stays, and the event is learned from."""
    append_good(log, range(40))
    record = log.read({SHOWN: 0}, max_records=1, timeout_s=0).records
    letters = decode(record, SCHEMA, now_ms=START_MS - 10 * 86_400_000).dead  # as a clock that is days behind judges
    assert [each.code for each in letters] == ["bad_time"]
    DeadLetterWriter(log).write(letters)

    reader = Reader(log)
    reader.read_all()

    assert reader.stream.ledger().dead_lettered == 0
    assert reader.audit().balanced


def test_an_audit_goes_on_where_retention_takes_what_it_reads(log: InMemoryLog) -> None:
    append_good(log, range(400))
    reader = Reader(log)
    reader.read_all()

    class Trimming:
        tries = 0

        def read(self, positions: dict[TopicPartition, int], **options: float) -> Fetch:
            self.tries += 1
            if self.tries < 3:
                log.truncate(SHOWN, 20 * self.tries)
            return log.read(positions, **options)  # type: ignore[arg-type]

        def __getattr__(self, name: str) -> object:
            return getattr(log, name)

    trimming = Trimming()
    end = log.end(IMPRESSIONS)[SHOWN]
    span = Span("", 0, end)

    recounter = Recounter(trimming, [SCHEMA], {}, lambda records: None)  # type: ignore[arg-type]
    recount = recounter.recount(SHOWN, span, end)

    assert trimming.tries == 3
    assert (recount.begin, recount.read) == (40, end - 40)


@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_the_recount_counts_what_the_decoder_counts(log: InMemoryLog, codec: str) -> None:
    """On records of every kind, damaged ones too."""
    append_everything(log)
    random = np.random.default_rng(3)
    fetch = log.read(log.begin(IMPRESSIONS), max_records=10_000, timeout_s=0)
    records = [r for r in fetch.records if dict(r.headers).get("codec") == codec.encode()]
    damaged = []
    for record in records:
        value = bytearray(record.value)
        for at in random.integers(0, len(value), 3):
            value[at] ^= int(random.integers(1, 256))
        damaged.append(OutRecord(bytes(value), record.headers, record.partition))
    log.append(IMPRESSIONS, [*damaged, OutRecord(b"", (("codec", b"other"),), 0)])
    ends = log.end(IMPRESSIONS)

    for at, end in ends.items():
        recount = Recounter(log, [SCHEMA], {}, lambda records: None).recount(at, Span("", 0, end), end)
        decoded = decode(log.read({at: 0}, max_records=100_000, timeout_s=0).records, SCHEMA)
        assert recount.read == len(decoded.impressions) + decoded.dead_impressions
