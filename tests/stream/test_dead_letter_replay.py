"""Replaying dead letters, in memory, on a real Valkey and on a real Kafka.

Guarantee shown: after a fix, the events of the chosen letters are read and learned from as if they had come right the
first time; no replay, however often and wherever it was interrupted, lets anything be learned from twice; the audit
balances at every step.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from smes.errors import EventLogUnavailable
from smes.events import FeedbackBlock
from stream.codec.codec import decode, encode_feedback
from stream.dead_letter_reading import LetterFilter, ReplayNote, read_entries
from stream.dead_letter_replay import GONE, NO_EVENT, ORIGIN, Replayer, read_notes, too_late_by
from stream.dead_letters import MAX_PAYLOAD_BYTES, DeadLetter, DeadLetterWriter
from stream.log.event_log import EventLog, OutRecord, TopicPartition
from stream.log.memory_log import InMemoryLog
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
    letters_in,
    with_headers,
)


def likes(ids: range) -> list[OutRecord]:
    """Likes, which a trainer without that task refuses."""
    return [feedback(each, "like") for each in ids]


def test_what_a_missing_task_refused_is_learned_from_after_the_fix_and_only_once(world: World) -> None:
    append_good(world.log, range(40))
    world.log.append(FEEDBACK, likes(range(0, 40, 4)))
    before = Reader(world.log, ONE_TASK)
    before.read_all()
    assert {(each.letter.code, each.letter.topic) for each in letters_in(world.log)} == {("unknown_task", FEEDBACK)}
    assert before.audit().balanced

    first = Replayer(world.log, SCHEMA).run()
    second = Replayer(world.another(), SCHEMA).run()
    assert (first.chosen, first.appended, first.events, first.replayed_before) == (10, 10, 10, 0)
    assert (second.chosen, second.appended, second.events, second.replayed_before) == (10, 0, 0, 10)

    # A trainer with the task from the beginning of the log, and one that never had to repair anything.
    repaired = Reader(world.another(), SCHEMA)
    repaired.read_all(flush=True)
    assert {i for i, (_, like) in repaired.labels.items() if like} == set(range(0, 40, 4))
    ledger = repaired.stream.ledger()
    # It can read the first copies, too: of the two, one counts.
    assert (ledger.feedback_duplicate, ledger.feedback_dead_lettered) == (10, 0)
    assert len(repaired.labels) == 40


def test_a_running_trainer_takes_replayed_events_and_the_audit_balances(world: World) -> None:
    append_good(world.log, range(40))
    bad = [impression(each, user_id="seven") for each in (100, 101, 102)]
    good = [impression(each, event_time_ms=START_MS + 2000 + each) for each in (200, 201, 202)]
    refused = [replace(record, headers=(("codec", b"avro"),)) for record in good]
    world.log.append(IMPRESSIONS, [*bad, *refused])
    reader = Reader(world.log)
    reader.read_all()
    assert reader.stream.ledger().dead_lettered == 6

    still_bad = Replayer(world.another(), SCHEMA).run()
    assert still_bad.appended == 0
    assert dict(still_bad.refused) == {"bad_id": 3, "unknown_codec": 3}

    # The fix: the same events, with headers that say what they are. (Here by a letter of such a record.)
    fixed = [with_headers(record, ONE_TASK) for record in good]
    world.log.append(IMPRESSIONS, fixed)
    reader.read_all()
    of_another_schema = Replayer(world.another(), SCHEMA).run(LetterFilter(codes=frozenset({"schema_mismatch"})))
    assert dict(of_another_schema.refused) == {"schema_mismatch": 3}
    adopting = Replayer(world.another(), SCHEMA, adopt_schema=True)
    outcome = adopting.run(LetterFilter(codes=frozenset({"schema_mismatch"})))
    assert (outcome.chosen, outcome.appended, dict(outcome.refused)) == (3, 3, {})

    reader.read_all(flush=True)
    assert {200, 201, 202} < reader.labels.keys()
    assert len(reader.labels) == 43
    result = reader.audit()
    assert result.balanced, result.imbalances
    assert result.letters == {"bad_id": 3, "schema_mismatch": 3, "unknown_codec": 3}
    assert sum(each.reinjected for each in result.partitions) == result.letters_replayed == 3


class Crash(Exception):
    """The replay's process dies here."""


class Crashing:
    """A log that dies at the n-th append, before or after the server has it."""

    def __init__(self, log: EventLog, at: int, *, after: bool) -> None:
        self._log, self._left, self._after = log, at, after

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        self._left -= 1
        if self._left == 0 and not self._after:
            raise Crash
        self._log.append(topic, records)
        if self._left == 0:
            raise Crash

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


@pytest.mark.parametrize("after", [False, True], ids=["before the server has it", "after the server has it"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])  # note, impressions, feedback, note
def test_a_replay_that_dies_anywhere_is_finished_by_the_next_and_nothing_is_appended_twice(
    world: World, at: int, after: bool
) -> None:
    append_good(world.log, range(20))
    late = [with_headers(impression(each, event_time_ms=START_MS + 2000), ONE_TASK) for each in (50, 52, 54)]
    world.log.append(IMPRESSIONS, late)
    world.log.append(FEEDBACK, [with_headers(feedback(50, event_time_ms=START_MS + 2100), ONE_TASK)])
    reader = Reader(world.log)
    reader.read_all()

    crashing: Any = Crashing(world.another(), at, after=after)
    with pytest.raises(Crash):
        Replayer(crashing, SCHEMA, adopt_schema=True).run()
    outcome = Replayer(world.another(), SCHEMA, adopt_schema=True).run()
    again = Replayer(world.another(), SCHEMA, adopt_schema=True).run()

    assert outcome.chosen == again.chosen == 4
    assert outcome.appended + outcome.found + outcome.replayed_before == 4
    assert (again.appended, again.replayed_before) == (0, 4)
    reader.read_all(flush=True)
    assert {50, 52, 54} < reader.labels.keys()
    assert reader.labels[50] == [1, 0]
    ledger = reader.stream.ledger()
    assert (ledger.duplicate, ledger.feedback_duplicate) == (0, 0)
    assert (ledger.impressions, ledger.feedback) == (20 + 3 + 3, 10 + 1 + 1)
    assert reader.audit().balanced


def test_two_copies_of_a_replayed_event_are_learned_from_once(world: World) -> None:
    """Where the log appends twice after a lost acknowledgement, or two replays run at a time."""
    append_good(world.log, range(20))
    record = with_headers(impression(50, event_time_ms=START_MS + 2000), ONE_TASK)
    world.log.append(IMPRESSIONS, [record])
    reader = Reader(world.log)
    reader.read_all()
    Replayer(world.another(), SCHEMA, adopt_schema=True).run()
    [stored] = letters_in(world.log)
    copy = with_headers(record, SCHEMA)
    copy = replace(copy, headers=(*copy.headers, (ORIGIN, stored.id.encode())))
    world.another().append(IMPRESSIONS, [copy])

    reader.read_all(flush=True)

    assert len(reader.labels) == 21
    assert reader.stream.ledger().duplicate == 1
    assert reader.audit().balanced


def test_a_dry_run_says_the_same_and_appends_nothing(world: World) -> None:
    append_good(world.log, range(20))
    world.log.append(FEEDBACK, likes(range(0, 20, 4)))
    Reader(world.log, ONE_TASK).read_all()
    ends = world.log.end(FEEDBACK) | world.log.end(DEAD_LETTERS)

    dry = Replayer(world.log, SCHEMA).run(dry_run=True)

    assert ends == world.log.end(FEEDBACK) | world.log.end(DEAD_LETTERS)
    assert dry == Replayer(world.log, SCHEMA).run()
    assert dry.appended == 5


def test_letters_are_chosen_by_reason_topic_partition_time_and_name(log: InMemoryLog) -> None:
    log.append(FEEDBACK, [feedback(1, "like"), feedback(2, "like", value="x"), feedback(3, value=7)])
    log.append(IMPRESSIONS, [impression(4, item_id=None)])
    Reader(log, ONE_TASK).read_all()
    stored = {each.letter.code: each for each in letters_in(log)}
    like, one = stored["unknown_task"], stored["label_range"]

    def chosen(**choice: Any) -> int:
        return Replayer(log, SCHEMA).run(LetterFilter(**choice), dry_run=True).chosen

    assert chosen() == 4
    assert chosen(codes=frozenset({"unknown_task"})) == 2
    assert chosen(codes=frozenset({"unknown_task", "label_range"})) == 3
    assert chosen(topics=frozenset({IMPRESSIONS})) == 1
    assert chosen(partitions=frozenset({0})) + chosen(partitions=frozenset({1})) == 4
    assert chosen(since_ms=one.written_ms) == 4
    assert chosen(since_ms=one.written_ms + 60_000) == chosen(until_ms=like.written_ms) == 0
    assert chosen(ids=(one.id,)) == chosen(ids=(one.id[:4],)) == chosen(ids=(one.place,)) == 1
    assert chosen(ids=(one.id, like.id, like.place)) == 2
    for wrong in ("abc", "xyz12", "feedback/1", ""):
        with pytest.raises(ValueError, match="expected an id"):
            LetterFilter(ids=(wrong,))


def test_copies_of_a_letter_are_replayed_once(log: InMemoryLog) -> None:
    """A trainer that restarts from its checkpoint writes letters again."""
    append_good(log, range(20))
    log.append(FEEDBACK, likes(range(0, 20, 4)))
    for _ in range(2):
        Reader(log, ONE_TASK).read_all()
    assert len(letters_in(log)) == 10

    outcome = Replayer(log, SCHEMA).run()

    assert (outcome.chosen, outcome.appended) == (5, 5)


def test_a_row_of_an_arrow_record_is_replayed_alone(world: World) -> None:
    append_good(world.log, range(20))
    block = FeedbackBlock.empty(8)
    block.impression_id[:] = np.arange(0, 16, 2)
    block.event_time_ms[:] = START_MS + 100 * block.impression_id + 60
    block.task[:] = np.arange(8) % 2  # every second one is a like, which the trainer does not know
    block.value[:] = 1
    records = encode_feedback(block, SCHEMA, "arrow", 2)
    old = [with_headers(record, ONE_TASK, "arrow") for record in records]
    world.log.append(FEEDBACK, old)
    Reader(world.log, ONE_TASK).read_all()
    assert {each.letter.row is None for each in letters_in(world.log)} == {False}

    outcome = Replayer(world.log, SCHEMA, adopt_schema=True).run()

    assert (outcome.appended, outcome.events) == (4, 4)
    reader = Reader(world.another(), SCHEMA)
    reader.read_all(flush=True)
    # The Arrow records themselves are refused by their schema hash; what was replayed of them is not.
    assert {i for i, (_, like) in reader.labels.items() if like} == set(block.impression_id[1::2].tolist())


def test_what_a_letter_holds_only_a_part_of_is_taken_from_the_log_while_it_is_there(world: World) -> None:
    large = json.loads(impression(1).value) | {"note": "x" * MAX_PAYLOAD_BYTES}
    record = replace(with_headers(impression(1), ONE_TASK), value=json.dumps(large).encode())
    world.log.append(IMPRESSIONS, [record, record])
    Reader(world.log).read_all()
    first, second = sorted(letters_in(world.log), key=lambda each: each.letter.offset)
    assert not first.is_whole

    def replayed(place: str) -> Any:
        return Replayer(world.another(), SCHEMA, adopt_schema=True).run(LetterFilter(ids=(place,)))

    assert replayed(second.place).appended == 1
    world.trim(TopicPartition(IMPRESSIONS, record.partition), 1)
    assert dict(replayed(first.place).impossible) == {GONE: 1}
    appended = decode(
        world.log.read({TopicPartition(IMPRESSIONS, record.partition): 2}, max_records=9, timeout_s=9).records, SCHEMA
    )
    assert (appended.impressions.impression_id.tolist(), appended.dead) == ([1], [])


def test_what_was_no_event_cannot_be_replayed(log: InMemoryLog) -> None:
    log.append_unreadable(TopicPartition(FEEDBACK, 1), b"other")
    Reader(log).read_all()
    example = DeadLetter(IMPRESSIONS, 0, -1, None, "not_finite", "", None, b"{}", place="impression 7")
    DeadLetterWriter(log).write([example])

    outcome = Replayer(log, SCHEMA).run()

    assert (outcome.chosen, outcome.appended, dict(outcome.impossible)) == (2, 0, {NO_EVENT: 2})


def test_an_event_that_is_refused_again_has_a_new_letter_that_can_be_replayed(log: InMemoryLog) -> None:
    log.append(FEEDBACK, likes(range(1)))
    old = Reader(log, ONE_TASK)
    old.read_all()
    Replayer(log, SCHEMA).run()
    old.read_all()  # this trainer was not fixed yet
    first, second = letters_in(log)

    outcome = Replayer(log, SCHEMA).run()

    assert (outcome.chosen, outcome.replayed_before, outcome.appended) == (2, 1, 1)
    appended = log.read({TopicPartition(FEEDBACK, first.letter.partition): 2}, max_records=9, timeout_s=0).records
    assert [value for name, value in appended[0].headers if name == ORIGIN] == [second.id.encode()]
    assert old.audit().balanced


def test_letters_written_while_a_replay_runs_are_left_to_the_next(log: InMemoryLog) -> None:
    """Else a trainer that refuses the replayed events would keep the replay going for ever."""
    log.append(FEEDBACK, likes(range(3)))
    old = Reader(log, ONE_TASK)
    old.read_all()

    class Meanwhile(Crashing):
        def append(self, topic: str, records: Sequence[OutRecord]) -> None:
            log.append(topic, records)
            old.read_all()

    meanwhile: Any = Meanwhile(log, 99, after=True)
    outcome = Replayer(meanwhile, SCHEMA).run()

    assert outcome.appended == 3
    assert len({each.id for each in letters_in(log)}) == 6


def test_events_that_come_too_late_are_named_before_they_are_appended(log: InMemoryLog) -> None:
    append_good(log, range(2000))  # 200 s
    early, late = (
        with_headers(impression(i, event_time_ms=START_MS + t), ONE_TASK) for i, t in ((5000, 190_000), (5001, 10))
    )
    log.append(IMPRESSIONS, [early, late])
    log.append(FEEDBACK, [with_headers(feedback(5001, event_time_ms=START_MS + 20), ONE_TASK)])
    reader = Reader(log)
    reader.read_all()
    state = reader.state()
    judge = too_late_by(SCHEMA, state, round(CONFIG.join.allowed_lateness_s * 1000))

    outcome = Replayer(log, SCHEMA, adopt_schema=True, too_late=judge).run()

    assert (outcome.events, outcome.too_late) == (3, 2)
    reader.read_all(flush=True)
    ledger = reader.stream.ledger()
    assert 5000 in reader.labels
    assert (ledger.late, ledger.feedback_late + ledger.orphaned) == (1, 1)
    assert reader.audit().balanced


def test_notes_lie_behind_their_letters_in_the_same_partition(log: InMemoryLog) -> None:
    log.ensure_topic(DEAD_LETTERS, 2)
    log.append(FEEDBACK, likes(range(8)))
    Reader(log, ONE_TASK).read_all()
    Replayer(log, SCHEMA).run()

    noted: dict[TopicPartition, set[str]] = {}
    for entry in read_entries(log):
        if isinstance(entry, ReplayNote):
            noted.setdefault(entry.at, set()).update(entry.ids)
    assert {each.at: each.id in noted[each.at] for each in letters_in(log)} == dict.fromkeys(noted, True)
    assert len(noted) == 2
    done, begun = read_notes(log)
    assert len(done) == 8
    assert {note.run for note in begun} == {begun[0].run}


def test_a_log_that_is_away_ends_the_replay_and_the_next_one_finishes_it(log: InMemoryLog) -> None:
    log.append(FEEDBACK, likes(range(3)))
    Reader(log, ONE_TASK).read_all()

    class Away(Crashing):
        def append(self, topic: str, records: Sequence[OutRecord]) -> None:
            if topic == FEEDBACK:
                raise EventLogUnavailable("away")
            log.append(topic, records)

    away: Any = Away(log, 1, after=True)
    with pytest.raises(EventLogUnavailable):
        Replayer(away, SCHEMA).run()
    outcome = Replayer(log, SCHEMA).run()
    assert (outcome.appended, outcome.found) == (3, 0)
