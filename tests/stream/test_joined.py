"""Joined examples through the topic: the same batches as without it, whatever dies in between."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from smes.arrays import Arrays
from smes.errors import EventLogError
from smes.events import ExampleBlock
from smes.schema import Feature, Schema, Task
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.join.waits import Wait
from stream.joined.config import ExamplesConfig
from stream.joined.joined_stream import JoinedStream
from stream.joined.records import encode_examples
from stream.joined.turn_stream import TurnStream
from stream.joined.turns import Turn
from stream.joined.writer import ExampleWriter
from stream.log.event_log import EventLog, Fetch, OutRecord, TopicPartition
from stream.log.memory_log import InMemoryLog
from stream.sources import Share
from stream.topics import EXAMPLES, FEEDBACK, IMPRESSIONS, partition_of
from tests.stream.join_reference import Feedback, Impression, feedback_block, impression_block
from tests.stream.refused_events import World

SCHEMA = Schema(
    name="test",
    features=(Feature("tab"), Feature("price", kind="numeric")),
    tasks=(Task("click", window_s=5), Task("like", window_s=10), Task("watch", kind="regression", window_s=8)),
)
START_MS = 1_700_000_000_000
WAITS: list[dict[str, Wait]] = [{}, {"click": "immediate", "like": 3.0}]


class Killed(BaseException):
    """The process is gone."""


class Dying:
    """An event log that dies in an append to the topic of examples: some of the records are there, and some are not."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self.keeps: Callable[[Sequence[OutRecord]], Sequence[OutRecord]] | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._log, name)

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        if topic == EXAMPLES and self.keeps is not None:
            self._log.append(topic, self.keeps(records))
            raise Killed
        self._log.append(topic, records)


def config(wait: dict[str, Wait], idle_after_s: float = 3600.0) -> StreamConfig:
    join = JoinConfig(1.0, 1e6, 2, {"default": "window", **wait})
    batch = MiniBatchConfig(size=7, max_age_s=6.0, max_wait_s=None)
    return StreamConfig(join, batch, events_per_read=40, idle_after_s=idle_after_s)


def events(random: Random, rows: int, *, strange: bool) -> tuple[list[Impression], list[Feedback]]:
    """Impressions over 60 s, some twice and some late; feedback, some too late, some of no impression.

    Strange feedback comes at any time, long before its impression, too.
    """
    shown = sorted((START_MS + random.randrange(60_000), i) for i in range(rows))
    impressions = [(i, ms) for ms, i in shown]
    for _ in range(rows // 8):
        i, ms = random.choice(impressions)
        impressions.insert(random.randrange(len(impressions)), (i if random.random() < 0.5 else rows + i, ms))
    feedback = []
    for _ in range(rows):
        i, ms = random.choice(impressions) if random.random() < 0.9 else (2 * rows + random.randrange(9), START_MS)
        ms = START_MS + random.randrange(75_000) if strange else ms + random.randrange(-900, 14_000)
        feedback.append((i, ms, random.randrange(3), 1.0))
    return impressions, sorted(feedback, key=lambda each: each[1] + random.randrange(2_000))


def slices(random: Random, rows: int, *, strange: bool = False) -> list[tuple[list[Impression], list[Feedback]]]:
    """The same, in the order in which they reach the log, in a few pieces."""
    impressions, feedback = events(random, rows, strange=strange)
    cuts = [sorted([0, *random.sample(range(1, len(each)), 9), len(each)]) for each in (impressions, feedback)]
    shown = [impressions[a:b] for a, b in pairwise(cuts[0])]
    return list(zip(shown, [feedback[a:b] for a, b in pairwise(cuts[1])], strict=True))


def append(log: EventLog, impressions: list[Impression], feedback: list[Feedback]) -> None:
    partitions = log.partitions(IMPRESSIONS)
    if impressions:
        block = impression_block(impressions)
        block.ids[:, 2] = block.impression_id % 3
        log.append(IMPRESSIONS, encode_impressions(block, SCHEMA, "arrow", partitions))
    if feedback:
        log.append(FEEDBACK, encode_feedback(feedback_block(feedback), SCHEMA, "json", partitions))


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds


def begun(log: EventLog, settings: StreamConfig, clock: Clock, state: Arrays | None) -> ExampleWriter:
    """A join that has just started, from a checkpoint if there is one."""
    settings = replace(settings, batch=MiniBatchConfig(size=100, max_wait_s=None))  # a turn knows no batches
    stream = TurnStream(SCHEMA, settings, log, DeadLetterWriter(log), monotonic=clock)
    how = ExamplesConfig(max_wait_s=0.2, rows_per_record=3)
    writer = ExampleWriter(SCHEMA, how, stream, log, monotonic=clock, pause=clock.pause)
    if state is None:
        writer.begin_anew()
    else:
        writer.resume(state)
    return writer


def batches(stream: JoinedStream | ExampleStream) -> list[ExampleBlock]:
    """Everything up to the log's end, as it is batched."""
    end, taken = stream.end(), list[ExampleBlock]()
    while True:
        stream.poll(0.02)
        while (batch := stream.next_batch()) is not None:
            taken.append(batch)
        if stream.has_reached(end):
            return taken


def assert_same(got: list[ExampleBlock], expected: list[ExampleBlock]) -> None:
    assert [len(batch) for batch in got] == [len(batch) for batch in expected]
    for one, other in zip(got, expected, strict=True):
        for name, column in one.arrays().items():
            np.testing.assert_array_equal(column, getattr(other, name), err_msg=name)


def joined_through_kills(
    random: Random, log: EventLog, settings: StreamConfig, clock: Clock, *, idles: bool, kills: int
) -> tuple[ExampleWriter, int]:
    """Write everything to the topic, and die now and then: between two moments, or in the middle of an append.

    Returns:
        The last writer, and how many turns were repeated in all.
    """
    wait_s = 0.0 if isinstance(log, InMemoryLog) else 0.02
    repeated, killed = 0, 0
    dying = Dying(log)
    log.ensure_topic(EXAMPLES, log.partitions(IMPRESSIONS))
    writer = begun(dying, settings, clock, None)  # type: ignore[arg-type]
    state = writer.state()
    for impressions, feedback in slices(random, 160, strange=idles):
        append(log, impressions, feedback)
        clock.now_s += 10_000 if idles and random.random() < 0.3 else 0.05
        for turn in range(random.randrange(1, 8)):
            dies = killed < kills or (kills > 0 and repeated == 0)  # a server may have given nothing before each kill
            try:
                if dies and random.random() < 0.4:
                    dying.keeps = lambda records: [each for each in records if random.random() < 0.6]
                writer.advance(wait_s if turn else 25 * wait_s)  # what was just appended is there: it is waited for
                clock.now_s += random.choice([0.0, 0.3])
                if random.random() < 0.3:
                    writer.settle()
                    writer.note_written()
                    state = writer.state()
                if dies and random.random() < 0.1:
                    raise Killed
            except Killed:
                killed += 1
                dying.keeps = None
                clock.now_s += 1.0
                writer = begun(dying, settings, clock, state)  # type: ignore[arg-type]
                repeated += writer.repeated
            dying.keeps = None
    stream = writer._stream
    end = stream.end()
    while not stream.has_reached(end):
        writer.advance(wait_s)
    writer.flush()
    return writer, repeated


@pytest.mark.parametrize(
    ("world", "wait", "kills"),
    [
        ("memory", WAITS[0], 0),
        ("memory", WAITS[1], 12),
        ("redis", WAITS[1], 6),
        pytest.param("kafka", WAITS[1], 6, marks=pytest.mark.kafka),
    ],
    indirect=["world"],
)
def test_batches_are_those_of_a_trainer_that_joins_itself(world: World, wait: dict[str, Wait], kills: int) -> None:
    """Bit for bit, with labels that come later, and with a join that is killed in the middle of its appends."""
    log, settings = world.log, config(wait)
    writer, repeated = joined_through_kills(Random(kills), log, settings, Clock(), idles=False, kills=kills)
    direct = ExampleStream(SCHEMA, settings, log, DeadLetterWriter(log))
    expected = batches(direct)
    direct.flush()
    while (batch := direct.next_batch()) is not None:
        expected.append(batch)

    through = JoinedStream(SCHEMA, settings, world.another(), DeadLetterWriter(log))
    got = batches(through)
    assert_same(got, expected)
    ledger, of_join = through.ledger(), writer._stream.ledger()
    assert ledger.impressions == ledger.handed_out + ledger.duplicate == of_join.handed_out + ledger.duplicate
    assert ledger.waiting == 0
    assert of_join.late
    assert of_join.duplicate
    assert of_join.orphaned
    assert (repeated > 0) == (kills > 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_join_repeats_what_only_the_clock_had_decided(seed: int) -> None:
    """Partitions that were idle were not waited for; the repeat, which cannot know that, gives the same examples."""
    log, random = InMemoryLog(), Random(seed)
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 3)
    settings = config(WAITS[seed % 2], idle_after_s=2.0)
    writer, repeated = joined_through_kills(random, log, settings, Clock(), idles=True, kills=10)
    through = JoinedStream(SCHEMA, settings, log, DeadLetterWriter(log))
    got = ExampleBlock.concat([ExampleBlock.empty(SCHEMA), *batches(through)])
    first = got.impression_id[got.begins]
    assert len(np.unique(first)) == len(first) == writer._stream.ledger().handed_out
    assert repeated
    assert (np.diff(got.due_ms[:-20]) >= 0).mean() > 0.9  # in the order in which they were due, but for a flush


def test_a_reader_goes_on_where_it_was_and_ranks_read_their_partitions_in_order() -> None:
    """A restart loses and doubles nothing; ranks see the rows of their partitions in the order of the whole."""
    log, settings = InMemoryLog(), config({})
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 3)
    joined_through_kills(Random(1), log, settings, Clock(), idles=False, kills=4)
    letters = DeadLetterWriter(log)
    whole = JoinedStream(SCHEMA, settings, log, letters)
    expected = batches(whole)
    rows = ExampleBlock.concat(expected)
    for rank in range(2):
        mine = ExampleBlock.concat(batches(JoinedStream(SCHEMA, settings, log, letters, share=Share(rank, 2))))
        np.testing.assert_array_equal(mine.impression_id, rows.impression_id[rows.partition % 2 == rank])
    got, stream = list[ExampleBlock](), JoinedStream(SCHEMA, settings, log, letters)
    while len(got) < len(expected):
        stream.poll(0.0)
        while (batch := stream.next_batch()) is not None:
            got.append(batch)
            after = JoinedStream(SCHEMA, settings, log, letters)
            after.load_state(stream.state())
            stream = after
    assert_same(got, expected)
    assert stream.ledger() == whole.ledger()
    with pytest.raises(ValueError, match="expected one on the topics of events"):
        ExampleStream(SCHEMA, settings, log, letters).load_state(stream.state())
    with pytest.raises(ValueError, match="4 ranks: topic 'examples' has 3 partitions"):
        JoinedStream(SCHEMA, settings, log, letters, share=Share(0, 4))


def test_a_join_that_was_thought_dead_counts_for_nobody() -> None:
    """What it writes behind the fence of the join that follows is passed over."""
    log, settings, clock = InMemoryLog(), config({}), Clock()
    for topic in (IMPRESSIONS, FEEDBACK, EXAMPLES):
        log.ensure_topic(topic, 2)
    first = begun(log, settings, clock, None)
    state = first.state()
    for impressions, feedback in slices(Random(3), 120):
        append(log, impressions, feedback)
    second = begun(log, settings, clock, state)
    for writer in (first, second):
        while not writer._stream.has_reached(writer._stream.end()):
            writer.advance(0.0)
        writer.flush()
    through = JoinedStream(SCHEMA, settings, log, DeadLetterWriter(log))
    got = ExampleBlock.concat(batches(through))
    assert len(np.unique(got.impression_id)) == len(got) == second._stream.ledger().handed_out
    assert through.ledger().duplicate == first._stream.ledger().handed_out
    with pytest.raises(EventLogError, match="another join has begun to write after this one"):
        first.note_written()
    second.note_written()


def test_what_a_join_that_was_thought_dead_writes_after_the_next_ones_checkpoint_counts_for_nobody() -> None:
    """The third join does not take it for a turn of the second one, so it writes that turn itself."""
    log, settings, clock = InMemoryLog(), config({}), Clock()
    for topic in (IMPRESSIONS, FEEDBACK, EXAMPLES):
        log.ensure_topic(topic, 2)
    first = begun(log, settings, clock, None)
    second = begun(log, settings, clock, first.state())
    second.note_written()
    for impressions, feedback in slices(Random(3), 120):
        append(log, impressions, feedback)
    while not first._stream.has_reached(first._stream.end()):
        first.advance(0.0)
    first.flush()
    with pytest.raises(EventLogError, match="another join has begun"):  # though the last records are its own
        first.note_written()
    third = begun(log, settings, clock, second.state())
    while not third._stream.has_reached(third._stream.end()):
        third.advance(0.0)
    third.flush()
    through = JoinedStream(SCHEMA, settings, log, DeadLetterWriter(log))
    got = ExampleBlock.concat([ExampleBlock.empty(SCHEMA), *batches(through)])
    assert len(np.unique(got.impression_id)) == len(got) == third._stream.ledger().handed_out > 0


def test_what_others_write_is_read_and_what_is_wrong_is_a_letter() -> None:
    """Records without turns come by the time at which they were due; each bad row has a letter with its field."""
    log, settings = InMemoryLog(), config({})
    log.ensure_topic(EXAMPLES, 2)
    block = ExampleBlock.empty(SCHEMA, 12)
    block.impression_id[:] = np.arange(12)
    block.ids[:] = 1
    block.event_time_ms[:] = START_MS + 1000 * np.arange(12)
    block.due_ms[:] = block.event_time_ms + 10_000
    block.partition[:] = partition_of(block.impression_id, 2)
    block.labels[3, 0] = 1
    for i in range(12):
        p = int(block.partition[i])
        log.append(EXAMPLES, [encode_examples(block.take(np.array([i])), SCHEMA, None, p, np.array([0]))])
    bad = block.take(np.array([0, 1]))
    bad.labels[0, 0], bad.late_share[1, 1] = 7, 3
    record = encode_examples(bad, SCHEMA, None, 0, np.arange(2))
    log.append(EXAMPLES, [record, OutRecord(b"nothing", record.headers, 1), OutRecord(record.value, (), 1)])
    through = JoinedStream(SCHEMA, settings, log, DeadLetterWriter(log))
    got = batches(through)
    through.flush()
    rows = ExampleBlock.concat([*got, *filter(None, iter(through.next_batch, None))])
    np.testing.assert_array_equal(np.sort(rows.impression_id), np.arange(12))
    np.testing.assert_array_equal(rows.labels[rows.impression_id == 3], block.labels[3:4])
    at = {TopicPartition("dead_letters", 0): 0}
    letters = b" ".join(record.value for record in log.read(at, max_records=9, timeout_s=0).records)
    for text in (b"label_range", b"labels.click", b"late_share.like", b"unparsable", b"unknown_codec"):
        assert text in letters
    assert through.ledger().dead_lettered == 4


def test_a_turn_may_be_larger_than_what_is_read_ahead() -> None:
    """Small turns, which are taken, and in the same read the beginning of one that closes many windows."""
    log = InMemoryLog()
    log.ensure_topic(EXAMPLES, 1)
    parts_of = dict.fromkeys(range(1, 61), (1, 1)) | {61: (50, 3)}
    for number, (parts, rows) in parts_of.items():
        for part in range(parts):
            block = ExampleBlock.empty(SCHEMA, rows)
            row = rows * part + np.arange(rows)
            block.impression_id[:], block.ids[:] = 1000 * number + row, 1
            block.event_time_ms[:], block.due_ms[:] = START_MS, START_MS + number
            turn = Turn(1, number, part, parts, (number,), START_MS + number, (0,), (0,))
            log.append(EXAMPLES, [encode_examples(block, SCHEMA, turn, 0, row)])
    stream = JoinedStream(SCHEMA, config({}), log, DeadLetterWriter(log))
    got = batches(stream)
    stream.flush()
    assert sum(map(len, got)) + sum(map(len, iter(stream.next_batch, None))) == 60 + 150


def test_what_is_read_ahead_of_a_partition_that_is_away_is_bounded() -> None:
    """The first turn lacks its part in partition 1, whose server is away; partition 0 has many turns after it."""

    class Away(Dying):
        away = True

        def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
            here = {at: n for at, n in positions.items() if at.partition == 0 or not self.away}
            fetch = self._log.read(here, max_records=max_records, timeout_s=0.0) if here else Fetch([], {}, frozenset())
            return replace(fetch, positions={**positions, **fetch.positions})

    log = Away(InMemoryLog())
    log._log.ensure_topic(EXAMPLES, 2)
    block = ExampleBlock.empty(SCHEMA, 4)
    block.ids[:], block.event_time_ms[:], block.due_ms[:] = 1, START_MS, START_MS
    for number in range(1, 201):
        block.impression_id[:] = 10 * number + np.arange(4)
        turn = Turn(1, number, 0, 1, (number, 1), START_MS, (0, 0), (0, 0))
        for p in range(1 + (number == 1)):
            log.append(EXAMPLES, [encode_examples(block, SCHEMA, turn, p, 4 * p + np.arange(4))])
    settings = config({})
    stream = JoinedStream(SCHEMA, settings, log, DeadLetterWriter(log._log))  # type: ignore[arg-type]
    read = sum(stream.poll(0.0) for _ in range(100))
    assert settings.events_per_read < read < 4 * settings.events_per_read
    log.away = False
    got = batches(stream)
    stream.flush()
    assert sum(map(len, got)) + sum(map(len, iter(stream.next_batch, None))) == 4 * 201


def test_a_part_that_never_comes_holds_up_no_drain() -> None:
    """The first turn lacks its part in partition 1 for good, as after damage; partition 0 has many turns after it."""
    log = InMemoryLog()
    log.ensure_topic(EXAMPLES, 2)
    block = ExampleBlock.empty(SCHEMA, 4)
    block.ids[:], block.event_time_ms[:], block.due_ms[:] = 1, START_MS, START_MS
    for number in range(1, 201):
        block.impression_id[:] = 10 * number + np.arange(4)
        turn = Turn(1, number, 0, 1, (number, 1), START_MS, (0, 0), (0, 0))
        log.append(EXAMPLES, [encode_examples(block, SCHEMA, turn, 0, np.arange(4))])
    stream = JoinedStream(SCHEMA, config({}), log, DeadLetterWriter(log))
    end = stream.end()
    polls = next((n for n in range(500) if stream.poll(0.0) == 0 and stream.has_reached(end)), None)
    assert polls is not None, "the drain never ends"
