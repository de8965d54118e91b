"""From an event log to mini-batches: which partitions hold time back, when positions move, how much a read returns.

Guarantee shown: a position never moves past an event that is not in the join or in the dead-letter topic, a restart
goes on with the very next batch, and catching up on full Arrow records stays within bounds.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from smes.errors import EventLogError, EventLogUnavailable
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import Feature, Schema, Task
from stream.batch_journal import BatchJournal
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog, OutRecord, TopicPartition
from stream.log.memory_log import InMemoryLog
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS

SCHEMA = Schema("example", tasks=(Task("click", window_s=5), Task("like", window_s=10)), features=(Feature("tab"),))
START_MS = 1_700_000_000_000
# With one voucher, a single event says how far its partition is.
CONFIG = StreamConfig(
    join=JoinConfig(allowed_lateness_s=0, vouchers=1), batch=MiniBatchConfig(size=10), idle_after_s=30
)


class Clock:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def open_log(partitions: int = 2) -> InMemoryLog:
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, partitions)
    return log


def impressions(ids: Sequence[int]) -> ImpressionBlock:
    """One impression per id, ``id`` × 100 ms after the start."""
    block = ImpressionBlock.empty(SCHEMA, len(ids))
    block.impression_id[:] = ids
    block.event_time_ms[:] = START_MS + 100 * np.array(ids)
    block.ids[:] = np.stack([np.array(ids) % 7, np.array(ids) % 11, np.array(ids) % 3], axis=1)
    return block


def clicks(ids: Sequence[int]) -> FeedbackBlock:
    """A click on each, a second after it was shown."""
    block = FeedbackBlock.empty(len(ids))
    block.impression_id[:] = ids
    block.event_time_ms[:] = START_MS + 100 * np.array(ids) + 1000
    block.value[:] = 1
    return block


def append(
    log: EventLog, ids: Sequence[int], codec: Literal["json", "arrow"] = "json", partition: int | None = None
) -> None:
    """Impressions and their clicks; all into one partition if one is given."""
    for topic, records in (
        (IMPRESSIONS, encode_impressions(impressions(ids), SCHEMA, codec, log.partitions(IMPRESSIONS))),
        (FEEDBACK, encode_feedback(clicks(ids), SCHEMA, codec, log.partitions(FEEDBACK))),
    ):
        log.append(topic, [r if partition is None else replace(r, partition=partition) for r in records])


def open_stream(log: EventLog, config: StreamConfig = CONFIG, clock: Clock | None = None) -> ExampleStream:
    return ExampleStream(SCHEMA, config, log, DeadLetterWriter(log), monotonic=clock or Clock())


def ready_ids(stream: ExampleStream) -> list[int]:
    """Takes all batches that are ready."""
    ids: list[int] = []
    while (batch := stream.next_batch()) is not None:
        ids += batch.impression_id.tolist()
    return ids


def read_all(stream: ExampleStream) -> None:
    while stream.poll(0):
        pass


def test_an_idle_partition_holds_time_back_only_for_so_long() -> None:
    log, clock = open_log(), Clock()
    stream = open_stream(log, clock=clock)
    append(log, range(300), partition=0)

    read_all(stream)

    assert ready_ids(stream) == []  # partition 1 of both topics may still bring older events
    clock.now_s += 29.9
    stream.poll(0)
    assert ready_ids(stream) == []
    clock.now_s += 0.2
    append(log, [300], partition=0)  # 0 has news: it alone says how far time is
    read_all(stream)
    # Time is at impression 300, START + 30 s: of longest window 10 s, everything before START + 20 s is complete.
    assert ready_ids(stream) == list(range(200))


def test_a_partition_that_was_idle_counts_again_as_soon_as_it_has_news() -> None:
    log, clock = open_log(), Clock()
    stream = open_stream(log, clock=clock)
    append(log, range(150), partition=0)
    read_all(stream)
    clock.now_s += 31
    append(log, range(150, 160), partition=0)
    append(log, [120], partition=1)  # behind the others
    read_all(stream)
    append(log, range(160, 400), partition=0)
    clock.now_s += 1

    read_all(stream)

    # Partition 1 is at impression 120 (START + 12 s): only what is before START + 2 s is complete.
    assert ready_ids(stream) == list(range(20))


def test_a_partition_with_records_left_to_read_is_never_idle() -> None:
    log, clock = open_log(1), Clock()
    stream = open_stream(log, replace(CONFIG, events_per_read=1), clock)
    append(log, range(40))
    for _ in range(5):
        clock.now_s += 100  # reads far apart, as by a trainer that is slow
        stream.poll(0)
    # Nothing but idleness could have moved the watermark past a source that has hardly been read.
    feedback_read = stream.positions[TopicPartition(FEEDBACK, 0)]

    assert stream.assembler.watermark_ms <= START_MS + 100 * max(feedback_read - 1, 0) + 1000


class RefusesLetters(InMemoryLog):
    """An event log whose dead-letter topic is away for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.away = True

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        if topic == DEAD_LETTERS and self.away:
            raise EventLogUnavailable("dead letters: no answer within 1 s")
        super().append(topic, records)


def test_positions_move_only_once_the_dead_letters_are_written() -> None:
    log = RefusesLetters()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 1)
    append(log, range(30))
    stream = open_stream(log)
    read_all(stream)
    before, ledger = dict(stream.positions), stream.ledger()
    append(log, [30])
    log.append(IMPRESSIONS, [OutRecord(b"no event", (), 0)])
    for _ in range(2):
        with pytest.raises(EventLogUnavailable):
            stream.poll(0)
        assert (stream.positions, stream.ledger()) == (before, ledger)
        assert log.end(DEAD_LETTERS) == {TopicPartition(DEAD_LETTERS, 0): 0}
    log.away = False
    read_all(stream)

    after = stream.ledger()

    assert (after.impressions, after.dead_lettered, after.feedback) == (32, 1, 31)
    assert log.end(DEAD_LETTERS) == {TopicPartition(DEAD_LETTERS, 0): 1}
    assert stream.has_reached(stream.end())


@pytest.mark.parametrize(
    ("events_per_record", "total", "bound"), [(1, 2000, 200), (50, 12_000, 2000), (500, 12_000, 2000)]
)
def test_catching_up_stays_within_events_per_read(events_per_record: int, total: int, bound: int) -> None:
    log = open_log()
    for start in range(0, total, events_per_record):
        append(log, range(start, start + events_per_record), "arrow", partition=0)
    stream = open_stream(log, replace(CONFIG, events_per_read=bound))
    sizes = []
    while not stream.has_reached(stream.end()):
        sizes.append(stream.poll(0))

    assert sum(sizes) == 2 * total
    # The first read does not know yet how many events a record holds; it takes few records.
    assert max(sizes[1:]) <= bound + events_per_record
    assert sizes[0] <= max(bound, 8 * events_per_record)
    assert len(sizes) <= 2 * total / bound + 14  # and it does not crawl either


def test_full_records_after_many_tiny_ones_do_not_flood() -> None:
    log, bound = open_log(1), 1000
    for i in range(200):
        append(log, [i], "arrow")
    for start in range(200, 20_200, 100):
        append(log, range(start, start + 100), "arrow")
    stream = open_stream(log, replace(CONFIG, events_per_read=bound))
    sizes = []
    while not stream.has_reached(stream.end()):
        sizes.append(stream.poll(0))

    assert sum(sizes) == 2 * 20_200
    # The reads that meet the change may be surprised; those after it may not.
    assert len(sizes) > 20
    assert max(sizes[-10:]) <= bound + 100


def test_feedback_with_fewer_partitions_than_impressions_is_refused() -> None:
    log = InMemoryLog()
    log.ensure_topic(IMPRESSIONS, 3)
    log.ensure_topic(FEEDBACK, 2)

    with pytest.raises(EventLogError, match=r"topic 'feedback': 2 partitions, expected at least 3 as topic 'impr"):
        open_stream(log)


@pytest.mark.parametrize("codec", ["json", "arrow"])
@pytest.mark.parametrize("reads", [1, 3, 9])
def test_a_restart_goes_on_with_the_very_next_batch(codec: Literal["json", "arrow"], reads: int) -> None:
    log = open_log()
    for start in range(0, 600, 20):
        append(log, range(start, start + 20), codec)
    log.append(FEEDBACK, [OutRecord(b"{", (), 1)])
    config = replace(CONFIG, events_per_read=90)
    whole = open_stream(log, config)
    read_all(whole)
    wanted = whole.state()

    first = open_stream(log, config)
    for _ in range(reads):
        first.poll(0)
    saved = {name: array.copy() for name, array in first.state().items()}
    read_all(first)
    second = open_stream(log, config)
    second.load_state(saved)

    read_all(second)

    assert second.positions == whole.positions
    assert second.positions_by_topic() == whole.positions_by_topic()
    assert second.ledger() == whole.ledger()
    got = second.state()
    assert got.keys() == wanted.keys()
    # Which row of the join's tables an entry has depends on which rows were free; a restart packs them.
    for name in (n for n in wanted if "/entry." not in n and "/waiting." not in n):
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)
    batch = whole.next_batch()
    assert batch is not None
    assert batch.labels[:, 0].tolist() == [1.0] * len(batch)


def test_upcoming_is_the_batch_that_comes_next() -> None:
    log = open_log()
    append(log, range(300))
    stream = open_stream(log)
    read_all(stream)

    upcoming = stream.upcoming()

    assert upcoming is not None
    assert stream.next_batch() is upcoming
    assert stream.upcoming() is not upcoming


def test_without_a_complete_batch_there_is_none() -> None:
    stream = open_stream(open_log())

    assert stream.upcoming() is None
    assert stream.next_batch() is None


def test_refused_events_and_unknown_fields_are_counted_by_partition() -> None:
    log = open_log()
    log.append(IMPRESSIONS, [OutRecord(b"{", (), 1), OutRecord(b"[]", (), 1), OutRecord(b"7", (), 0)])
    [record] = encode_feedback(clicks([3]), SCHEMA, "json", 1)
    log.append(FEEDBACK, [replace(record, value=record.value[:-1] + b',"x":1,"y":2}', partition=1)])
    stream = open_stream(log)

    read_all(stream)
    state = stream.state()

    refused = {name: array.tolist() for name, array in state.items() if name.endswith("/refused")}

    assert refused == {
        "impressions/0/refused": [1, 0, 0, 0, 0],
        "impressions/1/refused": [2, 0, 0, 0, 0],
        "feedback/0/refused": [0, 0, 0, 0, 0],
        "feedback/1/refused": [0, 2, 0, 0, 0],
    }


def test_positions_are_given_by_topic() -> None:
    log = open_log()
    append(log, [1], partition=1)
    stream = open_stream(log)

    read_all(stream)

    assert stream.positions_by_topic() == {FEEDBACK: {"0": 0, "1": 1}, IMPRESSIONS: {"0": 0, "1": 1}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"events_per_read": 0}, "StreamConfig.events_per_read: 0, expected at least 1"),
        ({"idle_after_s": 0.0}, "StreamConfig.idle_after_s: 0.0, expected more than 0"),
        ({"max_future_s": -1.0}, "StreamConfig.max_future_s: -1.0, expected at least 0"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**wrong)  # type: ignore[arg-type]  # one wrong value at a time


WAITING = replace(CONFIG, batch=MiniBatchConfig(size=10, max_wait_s=0.5))


def ready_batches(stream: ExampleStream) -> list[list[int]]:
    """Takes all batches that are ready."""
    batches: list[list[int]] = []
    while (batch := stream.next_batch()) is not None:
        batches.append(batch.impression_id.tolist())
    return batches


def test_a_batch_ends_when_its_oldest_example_has_waited() -> None:
    log, clock = open_log(1), Clock()
    stream = open_stream(log, WAITING, clock)
    append(log, range(125))  # impressions 0 … 33 are complete: the feedback of the last is at 12.4 + 1 s
    read_all(stream)
    times = stream.taken_times()
    full = ready_batches(stream)
    clock.now_s += 0.4
    append(log, [125, 126])
    read_all(stream)
    assert ready_batches(stream) == []
    clock.now_s += 0.11

    stream.poll(0)
    [rest] = ready_batches(stream)

    assert times is None
    assert [*chain(*full), *rest] == list(range(len(full) * 10 + len(rest)))
    assert 0 < len(rest) < 10
    times = stream.taken_times()
    assert times is not None
    assert sorted(set(times.joined_s.tolist())) == [1000.0, 1000.4]
    assert times.batched_s == pytest.approx(1000.51)


def test_without_a_longest_wait_a_batch_waits_until_it_is_full() -> None:
    log, clock = open_log(1), Clock()
    stream = open_stream(log, replace(CONFIG, batch=MiniBatchConfig(size=10, max_wait_s=None)), clock)
    append(log, range(125))
    read_all(stream)
    clock.now_s += 20
    stream.poll(0)

    assert {len(batch) for batch in ready_batches(stream)} == {10}


def test_a_read_ends_when_the_batch_has_to() -> None:
    waits: list[float] = []

    class Noting(InMemoryLog):
        def read(self, positions, *, max_records, timeout_s):  # type: ignore[no-untyped-def] # as its parent
            waits.append(timeout_s)
            return super().read(positions, max_records=max_records, timeout_s=0)

    log, clock = Noting(), Clock()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 1)
    stream = open_stream(log, WAITING, clock)
    append(log, range(125))
    read_all(stream)
    waits.clear()
    for pause_s in (0.2, 0.2, 0.2):
        clock.now_s += pause_s
        stream.poll(5)
    stream.poll(5)  # none waits any more

    assert waits == pytest.approx([0.3, 0.1, 0, 5])


@pytest.mark.parametrize("saved_after", [0, 1, 7])
def test_a_restart_repeats_the_batches_that_the_clock_ended(tmp_path: Path, saved_after: int) -> None:
    log, clock, random = open_log(2), Clock(), np.random.default_rng(5)
    path = tmp_path / "batches.journal"

    def opened(config: StreamConfig = WAITING) -> ExampleStream:
        return ExampleStream(
            SCHEMA, config, log, DeadLetterWriter(log), journal=BatchJournal(path, keep=2), monotonic=clock
        )

    first, batches, saved, taken = opened(), [], None, 0
    for i in range(60):
        append(log, range(10 * i, 10 * i + int(random.integers(1, 11))))
        clock.now_s += random.uniform(0, 0.6)
        first.poll(0)
        batches += ready_batches(first)
        if i == 20 + saved_after:
            saved, taken = {name: array.copy() for name, array in first.state().items()}, len(batches)
    assert saved is not None
    assert len({len(batch) for batch in batches}) > 3  # the clock ended many
    del first  # killed

    second = opened(replace(WAITING, events_per_read=16))  # reads in other slices, at other times
    second.load_state(saved)
    repeated: list[list[int]] = []
    while not second.has_reached(second.end()):
        clock.now_s += 0.7
        second.poll(0)
        repeated += ready_batches(second)

    assert len(batches) - taken > 5
    assert repeated[: len(batches) - taken] == batches[taken:]
    clock.now_s += 0.7
    second.poll(0)
    whole = list(chain(*batches[:taken], *repeated, *ready_batches(second)))
    assert len(whole) == len(set(whole))  # each once


def test_ends_that_the_log_does_not_lead_to_are_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, clock = open_log(1), Clock()
    journal = BatchJournal(tmp_path / "batches.journal", keep=2)
    empty = open_stream(log).state()
    journal.resume(0)
    journal.add(10**6)
    stream = ExampleStream(
        SCHEMA,
        WAITING,
        log,
        DeadLetterWriter(log),
        journal=BatchJournal(tmp_path / "batches.journal", keep=2),
        monotonic=clock,
    )
    stream.load_state(empty)
    append(log, range(125))
    for _ in range(90):
        stream.poll(0)
        ready_batches(stream)
        clock.now_s += 1
    assert "the log has ended before the examples" in caplog.text

    append(log, range(125, 128))
    stream.poll(0)
    clock.now_s += 1
    stream.poll(0)

    assert len(ready_batches(stream)) == 1
