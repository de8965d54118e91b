"""Damaged record batches in Kafka: every offset is read or reported, and none twice.

A producer here cuts its batches where the test says, and the segment files are damaged while the broker runs. How far
the damage reaches then depends on nothing else: see :mod:`stream.log.kafka_damage` for what the broker does with it.
"""

import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaProducer
from kafka.record.memory_records import MemoryRecordsBuilder
from kafka.record.util import calc_crc32c

from smes_cli.demo.local_servers import KafkaServer, start_kafka
from stream.log.event_log import Fetch, Positions, TopicPartition
from stream.log.kafka_config import KafkaLogConfig
from stream.log.kafka_damage import damaged_at
from stream.log.kafka_log import KafkaLog

DEADLINE_S = 60.0
SIZES = (3, 4, 5, 4, 3)  # records of each batch; a record's value is its offset
FIRSTS = (0, *accumulate(SIZES))
END = sum(SIZES)
INDEX_EVERY_BYTES = 4096  # Kafka's default; the segments here are smaller, so every walk of the broker begins at 0

_LENGTH_AT, _MAGIC_AT, _CRC_AT, _ATTRIBUTES_AT, _DELTA_AT, _RECORDS_AT = 8, 16, 17, 21, 23, 61

Damage = Callable[[bytearray], None]
Stretch = tuple[int, int]  # first offset, number of offsets


def flip(at: int, mask: int = 0xFF) -> Damage:
    def damage(batch: bytearray) -> None:
        batch[at] ^= mask

    return damage


def with_checksum(change: Damage) -> Damage:
    def damage(batch: bytearray) -> None:
        change(batch)
        struct.pack_into(">I", batch, _CRC_AT, calc_crc32c(bytes(batch[_ATTRIBUTES_AT:])))

    return damage


def codec(number: int) -> Damage:
    def damage(batch: bytearray) -> None:
        batch[_ATTRIBUTES_AT + 1] |= number

    return damage


def old_format(compression: int) -> Damage:
    """The magic byte, in a batch whose checksum begins with a kind of compression of the old format."""

    def damage(batch: bytearray) -> None:
        batch[_MAGIC_AT] ^= 0xFF
        batch[_CRC_AT] = compression

    return damage


PASSED_ALONE = {
    "a byte of a record": flip(_RECORDS_AT + 8),
    "the checksum": flip(_CRC_AT),
    "the last offset": flip(_DELTA_AT + 1),
    "the last offset, by a little": flip(_DELTA_AT + 3, 4),
    "the length of a record": with_checksum(flip(_RECORDS_AT)),
    "an unknown codec": with_checksum(codec(7)),
    "no gzip": with_checksum(codec(1)),
    "the magic byte, as if not compressed": old_format(0),
}
"""The broker finds the batches behind these."""

HIDES_THE_REST = {
    "the magic byte, as if in gzip": old_format(1),
    "the magic byte, as if in no known codec": old_format(7),
    "a negative length": flip(_LENGTH_AT),
}
"""The broker answers with an error, as often as it comes across one of these."""

STOPS_THE_BROKER = {
    "a length beyond the file": flip(_LENGTH_AT + 1),
    "a length that is wrong by one": flip(_LENGTH_AT + 3, 1),
}
"""The broker answers with nothing, or with another error where the wrong length leads it."""


@dataclass(frozen=True)
class Broker:
    """A Kafka of our own, whose files can be changed."""

    server: KafkaServer
    folder: Path

    def write(self, namespace: str, topics: list[str]) -> None:
        """Make topics of one partition, each with the batches of ``SIZES``."""
        log = KafkaLog(self.server.bootstrap, namespace)
        producer = KafkaProducer(bootstrap_servers=self.server.bootstrap, linger_ms=60_000)  # flush sends earlier
        try:
            for topic in topics:
                log.ensure_topic(topic, 1)
            for first, size in zip(FIRSTS, SIZES, strict=False):
                for topic in topics:
                    for i in range(first, first + size):
                        producer.send(f"{namespace}.{topic}", b"%d" % i, partition=0, timestamp_ms=1_700_000_000_000)
                producer.flush(DEADLINE_S)
        finally:
            producer.close(DEADLINE_S)
            log.close()

    def damage(self, namespace: str, topic: str, which: int, damage: Damage) -> None:
        """Damage one batch in the file that the broker reads."""
        path = self.folder / "data" / f"{namespace}.{topic}-0" / "00000000000000000000.log"
        segment, starts = path.read_bytes(), [0]
        while starts[-1] < len(segment):
            starts.append(starts[-1] + 12 + struct.unpack_from(">i", segment, starts[-1] + _LENGTH_AT)[0])
        assert [struct.unpack_from(">q", segment, start)[0] for start in starts[:-1]] == list(FIRSTS[:-1])
        assert len(segment) < INDEX_EVERY_BYTES
        batch = bytearray(segment[starts[which] : starts[which + 1]])
        damage(batch)
        with path.open("r+b") as file:
            file.seek(starts[which])
            file.write(batch)


@pytest.fixture(scope="module")
def broker(kafka_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    folder = tmp_path_factory.mktemp("damaged")
    with start_kafka(kafka_home, folder) as server:
        yield Broker(server, folder)


class Reader:
    """Reads on, topic by topic, and keeps what was read and what was reported."""

    def __init__(self, log: KafkaLog, topics: list[str]) -> None:
        self._log = log
        self.positions: Positions = {TopicPartition(topic, 0): 0 for topic in topics}
        self.at_end: frozenset[TopicPartition] = frozenset()
        self.seen: dict[str, list[int]] = {topic: [] for topic in topics}
        self.reported: dict[str, list[Stretch]] = {topic: [] for topic in topics}

    def read(self) -> Fetch:
        fetch = self._log.read(self.positions, max_records=1000, timeout_s=0.2)
        self.positions, self.at_end = fetch.positions, fetch.at_end
        for record in fetch.records:
            assert record.value == b"%d" % record.offset
            self.seen[record.topic].append(record.offset)
        for each in fetch.unreadable:
            self.reported[each.topic].append((each.offset, each.records))
        return fetch

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {self.positions}, {self.reported}"
            self.read()

    def to_end(self) -> None:
        self.until(lambda: self.at_end == set(self.positions))


def once_each(seen: list[int], reported: list[Stretch]) -> list[int]:
    """All offsets that were read or reported."""
    return sorted(seen + [offset for first, count in reported for offset in range(first, first + count)])


@pytest.mark.kafka
@pytest.mark.xdist_group("kafka_damage")
@pytest.mark.parametrize("which", [0, 2, 4], ids=["the first batch", "one in the middle", "the last batch"])
def test_damaged_batches_are_passed_and_reported(broker: Broker, namespace: str, which: int) -> None:
    """Each kind of damage in a topic of its own, read on its own: the error that another topic raises is no help."""
    damages = PASSED_ALONE | HIDES_THE_REST
    topics = {name: f"t{i}" for i, name in enumerate(damages)}
    broker.write(namespace, list(topics.values()))
    for name, topic in topics.items():
        broker.damage(namespace, topic, which, damages[name])
    log = KafkaLog(broker.server.bootstrap, namespace)
    readers = {name: Reader(log, [topic]) for name, topic in topics.items()}

    try:
        for reader in readers.values():
            reader.to_end()
    finally:
        log.close()

    first, size = FIRSTS[which], SIZES[which]
    alone, rest = [(first, size)], [(first, END - first)]
    reported = {name: reader.reported[topics[name]] for name, reader in readers.items()}
    assert reported == dict.fromkeys(PASSED_ALONE, alone) | dict.fromkeys(HIDES_THE_REST, rest)
    for name, reader in readers.items():
        assert once_each(reader.seen[topics[name]], reported[name]) == list(range(END))


@pytest.mark.kafka
@pytest.mark.xdist_group("kafka_damage")
def test_where_the_broker_returns_nothing_for_long_the_rest_is_passed_and_reported(
    broker: Broker, namespace: str
) -> None:
    topics = {f"t{i}": name for i, name in enumerate(STOPS_THE_BROKER)}
    broker.write(namespace, [*topics, "sound"])
    for topic, name in topics.items():
        broker.damage(namespace, topic, 2, STOPS_THE_BROKER[name])
    now_s = [0.0]
    config = KafkaLogConfig(outage_timeout_s=20.0)
    log = KafkaLog(broker.server.bootstrap, namespace, config, monotonic=lambda: now_s[0])
    reader = Reader(log, [*topics, "sound"])
    beyond, by_one, sound = (TopicPartition(topic, 0) for topic in [*topics, "sound"])
    stopped = {beyond: FIRSTS[2], by_one: FIRSTS[3], sound: END}

    try:
        reader.until(lambda: reader.positions == stopped)
        for _ in range(3):
            reader.read()
        assert reader.positions == stopped
        now_s[0] += 19.0
        reader.read()
        assert reader.positions == stopped
        now_s[0] += 1.0
        reader.to_end()
    finally:
        log.close()

    assert reader.reported == {"t0": [(7, 12)], "t1": [(7, 5), (12, 7)], "sound": []}
    for topic, seen in reader.seen.items():
        assert once_each(seen, reader.reported[topic]) == list(range(END))


AT = TopicPartition("t", 0)


def sound_batch(first: int, count: int) -> bytes:
    builder = MemoryRecordsBuilder(magic=2, compression_type=0, batch_size=1 << 16, offset=first)
    for _ in range(count):
        builder.append(timestamp=1, key=None, value=b"x")
    builder.close()
    return bytes(builder.buffer())


@dataclass(frozen=True)
class Batch:
    """``sound``: can be read. ``checksum``: fetched, not decoded. ``trips``: every walk that meets it is an error."""

    size: int
    state: str
    indexed: bool  # a walk may begin here


class Walks:
    """How a broker searches an offset, as Kafka 4.2 does: batch by batch, from the nearest index entry on.

    In the middle of a batch it knows that this is the one only when it comes to the next one.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.starts = [0, *accumulate(batch.size for batch in batches)]
        self.end = self.starts[-1]

    def holds(self, offset: int) -> int:
        return bisect_right(self.starts, offset) - 1

    def fetch(self, offset: int) -> tuple[int, bytes]:
        holds = self.holds(offset)
        begin = max((i for i in range(holds + 1) if self.batches[i].indexed), default=0)
        last = holds if self.starts[holds] == offset else holds + 1
        if any(batch.state == "trips" for batch in self.batches[begin : last + 1]):
            return -1, b""
        return 0, b"".join(self.data(i) for i in range(holds, len(self.batches)))

    def data(self, i: int) -> bytes:
        data = bytearray(sound_batch(self.starts[i], self.batches[i].size))
        if self.batches[i].state != "sound":
            flip(_CRC_AT)(data)
        return bytes(data)


STATES = ["sound", "sound", "sound", "checksum", "trips"]
BATCHES = st.builds(Batch, size=st.integers(1, 40), state=st.sampled_from(STATES), indexed=st.booleans())


@given(st.lists(BATCHES, min_size=1, max_size=12).map(Walks), st.data())
def test_wherever_batches_are_damaged_each_offset_is_read_or_reported_once(walks: Walks, data: st.DataObject) -> None:
    begin = position = data.draw(st.integers(0, walks.end - 1))
    seen: list[int] = []
    reported: list[Stretch] = []

    while position < walks.end:
        code, _ = walks.fetch(position)
        i = walks.holds(position)
        if code == 0 and walks.batches[i].state == "sound":
            seen += range(position, walks.starts[i + 1])
            position = walks.starts[i + 1]
        else:
            found = damaged_at(AT, position, walks.end, walks.fetch)
            reported += [(each.offset, each.records) for each in found]
            position = max(each.offset + each.records for each in found)

    assert once_each(seen, reported) == list(range(begin, walks.end))


def test_a_stretch_that_can_be_read_after_all_is_not_reported() -> None:
    data = sound_batch(0, 5)

    assert damaged_at(AT, 2, 5, lambda offset: (0, data), stuck=True) == []


def test_nothing_before_the_end_is_damage_only_after_a_standstill() -> None:
    assert damaged_at(AT, 2, 5, lambda offset: (0, b"")) == []

    (found,) = damaged_at(AT, 2, 5, lambda offset: (0, b""), stuck=True)

    assert (found.offset, found.records, found.place) == (2, 3, "offsets 2 … 4")


def test_a_batch_that_ends_before_the_position_is_reported_from_there_on() -> None:
    """The broker holds that it reaches farther; a report of no record would be made for ever."""
    batch = bytearray(sound_batch(0, 5))
    flip(_CRC_AT)(batch)
    struct.pack_into(">i", batch, _DELTA_AT, 1)

    (found,) = damaged_at(AT, 3, 9, lambda offset: (0, bytes(batch)))

    assert (found.offset, found.records) == (3, 1)
