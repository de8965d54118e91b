"""Redis streams that others have changed: deleted entries, entries of other programs, ids and keys of other kinds."""

import uuid
from collections.abc import Iterator

import pytest
import redis

from smes.errors import EventLogError, PositionOutOfRange
from smes_cli.demo.local_servers import ValkeyServer, start_valkey
from stream.log.event_log import Fetch, OutRecord, Positions, TopicPartition
from stream.log.redis_entries import pack_headers
from stream.log.redis_ids import Id, id_before, offset_of, parse_id
from stream.log.redis_log import RedisLogConfig, RedisStreamsLog, connect_log

AT = TopicPartition("t", 0)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def key(namespace: str) -> str:
    return f"{{{namespace}}}:log:t:0"


@pytest.fixture
def log(redis_url: str, namespace: str) -> Iterator[RedisStreamsLog]:
    log = RedisStreamsLog(connect_log(redis_url, timeout_s=30), namespace, now_ms=lambda: 777)
    log.ensure_topic("t", 1)
    yield log
    log.close()


def append(log: RedisStreamsLog, start: int, stop: int) -> None:
    log.append("t", [OutRecord(b"%d" % i, (), 0) for i in range(start, stop)])


def read_all(log: RedisStreamsLog, positions: Positions, max_records: int = 1000) -> tuple[list[Fetch], Positions]:
    """Read until the end; it is a failure not to be there after 1,000 reads."""
    fetches = []
    for _ in range(1000):
        fetch = log.read(positions, max_records=max_records, timeout_s=0)
        fetches.append(fetch)
        positions = fetch.positions
        if positions == log.end("t"):
            return fetches, positions
    pytest.fail(f"not at the end: {positions}, {log.end('t')}")


def numbers(fetches: list[Fetch]) -> list[int]:
    return [int(record.value) for fetch in fetches for record in fetch.records]


def added(client: redis.Redis, key: str, entry_id: str = "*") -> str:
    """The id of a new entry that is no record."""
    place = client.xadd(key, {"foo": b"b\xffr"}, id=entry_id)
    assert isinstance(place, bytes)
    return place.decode()


def gaps(fetches: list[Fetch]) -> int:
    return sum(count for fetch in fetches for count in fetch.gaps.values())


@pytest.mark.parametrize("max_records", [1, 7, 1000])
@pytest.mark.parametrize(
    "deleted", [[0], [5], [399], [0, 1, 2], [200, 202], [397, 398, 399], list(range(400))], ids=lambda d: f"{d[:3]}"
)
def test_deleted_entries_are_passed_and_counted(
    log: RedisStreamsLog, client: redis.Redis, key: str, deleted: list[int], max_records: int
) -> None:
    append(log, 0, 400)
    client.xdel(key, *(f"0-{i + 1}" for i in deleted))

    fetches, positions = read_all(log, {AT: 0}, max_records)

    assert numbers(fetches) == [i for i in range(400) if i not in deleted]
    assert gaps(fetches) == len(deleted)
    assert positions == {AT: 400}


def test_begin_is_the_first_entry_that_is_there(log: RedisStreamsLog, client: redis.Redis, key: str) -> None:
    append(log, 0, 10)
    client.xdel(key, "0-1", "0-2", "0-6")

    assert (log.begin("t"), log.end("t")) == ({AT: 2}, {AT: 10})


def test_a_trimmed_entry_is_told_apart_from_a_deleted_one(log: RedisStreamsLog, client: redis.Redis, key: str) -> None:
    append(log, 0, 400)
    client.xdel(key, "0-300")
    client.xtrim(key, minid="0-310", approximate=False)

    with pytest.raises(PositionOutOfRange, match="t/0: no record at position 301: trimmed, the log begins at 309"):
        log.read({AT: 301}, max_records=10, timeout_s=0)

    fetches, _ = read_all(log, {AT: 309})

    assert (numbers(fetches), gaps(fetches)) == (list(range(309, 400)), 0)


def test_a_reader_that_read_all_that_was_trimmed_goes_on(log: RedisStreamsLog, client: redis.Redis, key: str) -> None:
    append(log, 0, 10)
    client.xadd(key, {"foo": "bar"})
    client.xtrim(key, maxlen=1, approximate=False)

    fetches, _ = read_all(log, {AT: 10})

    assert [len(fetch.unreadable) for fetch in fetches] == [1]
    with pytest.raises(PositionOutOfRange, match="position 9: trimmed"):
        log.read({AT: 9}, max_records=10, timeout_s=0)


@pytest.mark.parametrize(
    "entry_id",
    ["*", "0-*", "0-1000", "1-1", "1700000000000-5", "2000000000000-0", "9999999999999-0"],
)
def test_after_a_foreign_entry_reading_and_appending_go_on(
    log: RedisStreamsLog, client: redis.Redis, key: str, entry_id: str
) -> None:
    append(log, 0, 5)
    place = added(client, key, entry_id)
    append(log, 5, 10)
    client.xadd(key, {"v": "1", "h": "no headers", "t": "1"})
    append(log, 10, 15)

    for max_records in (1, 1000):
        fetches, positions = read_all(log, {AT: 0}, max_records)

        first, second = (bad for fetch in fetches for bad in fetch.unreadable)
        assert numbers(fetches) == list(range(15))
        assert gaps(fetches) == 0
        assert positions == log.end("t")
        assert (first.place, first.payload) == (f"entry {place}", b'{"foo":"b\\\\xffr"}')
        assert first.reason == "fields foo, expected v of a record of the event log"
        assert "headers of 10 bytes" in second.reason


def test_a_foreign_first_entry_is_read_from_the_beginning(log: RedisStreamsLog, client: redis.Redis, key: str) -> None:
    client.xadd(key, {"foo": "bar"})
    append(log, 0, 3)

    for positions in ({AT: 0}, log.begin("t")):
        fetches, _ = read_all(log, positions)

        assert numbers(fetches) == [0, 1, 2]
        assert [len(fetch.unreadable) for fetch in fetches] == [1]


def test_deleted_entries_are_counted_after_a_foreign_one(log: RedisStreamsLog, client: redis.Redis, key: str) -> None:
    append(log, 0, 3)
    milliseconds = added(client, key).split("-")[0]
    append(log, 3, 10)
    client.xdel(key, f"{milliseconds}-3", f"{milliseconds}-7")

    fetches, _ = read_all(log, {AT: 0}, 2)

    assert numbers(fetches) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert gaps(fetches) == 2


def test_records_of_another_program_are_read_whatever_their_ids(
    log: RedisStreamsLog, client: redis.Redis, key: str
) -> None:
    for i in range(20):
        client.xadd(key, {"v": str(i), "h": pack_headers(()), "t": 0})

    fetches, _ = read_all(log, log.begin("t"), 3)

    assert numbers(fetches) == list(range(20))
    assert {record.arrival_ms for fetch in fetches for record in fetch.records} == {777}  # the time of reading


def test_an_id_that_can_be_no_position_is_named(log: RedisStreamsLog, client: redis.Redis, key: str) -> None:
    append(log, 0, 3)
    client.xadd(key, {"foo": "bar"}, id="18446744073709551615-0")
    wanted = r"t/0: entry id 18446744073709551615-0 of another program .*docs/operate/outages.md"

    with pytest.raises(EventLogError, match=wanted):
        append(log, 3, 4)
    with pytest.raises(EventLogError, match=wanted):
        log.read({AT: 3}, max_records=10, timeout_s=0)


@pytest.mark.parametrize("entry_id", ["9999999999999-0", "1700000000000000-3", "1700000000000000000-0"])
def test_many_entries_of_several_writers_go_on_after_a_large_id(
    log: RedisStreamsLog, client: redis.Redis, key: str, entry_id: str, redis_url: str, namespace: str
) -> None:
    other = RedisStreamsLog(connect_log(redis_url, timeout_s=30), namespace)
    append(log, 0, 10)
    client.xadd(key, {"foo": "bar"}, id=entry_id)
    for start in range(10, 1010, 200):
        append(log, start, start + 100)
        append(other, start + 100, start + 200)
    other.close()

    fetches, _ = read_all(log, {AT: 0}, 77)

    assert numbers(fetches) == list(range(1010))
    assert gaps(fetches) == 0


def test_a_key_of_another_type_is_named(log: RedisStreamsLog, client: redis.Redis, key: str, namespace: str) -> None:
    client.set(key, "junk")

    for ask in (
        lambda: log.read({AT: 0}, max_records=1, timeout_s=0),
        lambda: log.append("t", [OutRecord(b"x", (), 0)]),
        lambda: log.end("t"),
        lambda: log.incarnations("t"),
    ):
        with pytest.raises(EventLogError, match=rf"key {key} in Redis at .*holds a string, expected a stream.*DEL"):
            ask()

    client.delete(key, f"{{{namespace}}}:log:topics")
    client.set(f"{{{namespace}}}:log:topics", "junk")
    with pytest.raises(EventLogError, match=rf"key {{{namespace}}}:log:topics .*holds a string, expected a hash"):
        log.ensure_topic("u", 1)


@pytest.mark.parametrize("junk", ["two", "0", "-1", "1.5", ""])
def test_a_number_of_partitions_that_is_none_is_named(
    log: RedisStreamsLog, client: redis.Redis, namespace: str, junk: str
) -> None:
    client.hset(f"{{{namespace}}}:log:topics", "bad", junk)

    with pytest.raises(EventLogError, match=rf"topic 'bad' .*{{{namespace}}}:log:topics: b'{junk}', expected a number"):
        log.partitions("bad")


def test_an_incarnation_lives_and_dies_with_its_stream(log: RedisStreamsLog, client: redis.Redis, key: str) -> None:
    append(log, 0, 3)
    before = log.incarnations("t")
    append(log, 3, 6)
    client.xtrim(key, maxlen=0, approximate=False)

    assert log.incarnations("t") == before

    client.delete(key)
    append(log, 0, 3)
    after = log.incarnations("t")

    assert after != before
    assert numbers(read_all(log, {AT: 0})[0]) == [0, 1, 2]


def test_a_stream_that_a_foreign_producer_made_has_one_incarnation(
    log: RedisStreamsLog, client: redis.Redis, key: str, redis_url: str, namespace: str
) -> None:
    client.xadd(key, {"foo": "bar"})
    other = RedisStreamsLog(connect_log(redis_url, timeout_s=30), namespace)
    first = other.incarnations("t")
    other.close()
    append(log, 0, 1)

    assert log.incarnations("t") == first
    assert log.begin("t") != log.end("t")


def test_a_partition_without_entries_has_its_incarnation_already(log: RedisStreamsLog) -> None:
    before = log.incarnations("t")

    append(log, 0, 3)

    assert log.incarnations("t") == before


def test_retention_and_deletions_together_lose_nothing_of_what_is_there(redis_url: str, namespace: str) -> None:
    log = RedisStreamsLog(
        connect_log(redis_url, timeout_s=30), namespace, RedisLogConfig(max_entries_per_partition=100)
    )
    log.ensure_topic("t", 1)
    append(log, 0, 1000)
    begin = log.begin("t")[AT]
    with redis.Redis.from_url(redis_url) as client:
        client.xdel(f"{{{namespace}}}:log:t:0", f"0-{begin + 11}")

    fetches, _ = read_all(log, {AT: begin}, 7)
    log.close()

    assert numbers(fetches) == [i for i in range(begin, 1000) if i != begin + 10]
    assert gaps(fetches) == 1


def test_a_stream_survives_a_restart_with_its_incarnation(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(uuid.uuid4().hex)

    def incarnation(server: ValkeyServer) -> dict[TopicPartition, str]:
        log = RedisStreamsLog(connect_log(server.url, timeout_s=30), "ns")
        log.ensure_topic("t", 1)
        append(log, 0, 3)
        found = log.incarnations("t")
        log.close()
        return found

    with start_valkey(folder) as server:
        before = incarnation(server)
    with start_valkey(folder) as server:
        after = incarnation(server)
    with start_valkey(folder / "empty") as server:
        empty = incarnation(server)

    assert before == after != empty


@pytest.mark.parametrize(
    "entry",
    [
        (0, 1),
        (0, 2**59 - 1),
        (1, 0),
        (1, 2**20 - 1),
        (2, 0),
        (1_700_000_000_000, 0),
        (2**42 - 1, 2**20 - 1),
        (2**42, 0),
        (2**53 - 1, 127),
        (2**53, 0),
        (2**61 - 1, 0),
    ],
)
def test_an_id_and_its_position_are_each_others_inverse(entry: Id) -> None:
    position = offset_of(AT, entry) + 1

    assert 0 < position < 2**63
    assert id_before(position) == entry


def test_offsets_grow_with_ids() -> None:
    texts = [b"0-1", b"0-2", b"0-99999", b"1-0", b"1-1", b"1-1048575", b"2-0", b"1700000000000-0", b"9999999999999-1"]

    offsets = [offset_of(AT, parse_id(text)) for text in texts]

    assert offsets == sorted(set(offsets))
