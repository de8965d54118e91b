"""The in-memory log beyond the contract: tests make it end, fail and pause."""

import threading
import time

import pytest

from stream.log.event_log import OutRecord, TopicPartition
from stream.log.memory_log import InMemoryLog

AT = TopicPartition("t", 0)
HANG_S = 30.0  # longer than any load makes these waits, shorter than what would end them otherwise


@pytest.fixture
def log() -> InMemoryLog:
    log = InMemoryLog(now_ms=lambda: 7)
    log.ensure_topic("t", 2)
    log.append("t", [OutRecord(str(i).encode(), (), 0) for i in range(10)])
    return log


def read(log: InMemoryLog, position: int, timeout_s: float = 0) -> list[int]:
    return [r.offset for r in log.read({AT: position}, max_records=100, timeout_s=timeout_s).records]


def test_arrival_is_the_injected_clock() -> None:
    times = iter([1000, 2000])
    log = InMemoryLog(now_ms=lambda: next(times))
    log.ensure_topic("t", 1)
    log.append("t", [OutRecord(b"a", (), 0), OutRecord(b"b", (), 0)])
    log.append("t", [OutRecord(b"c", (), 0)])

    records = log.read({AT: 0}, max_records=10, timeout_s=0).records

    assert [r.arrival_ms for r in records] == [1000, 1000, 2000]


def test_an_error_set_for_an_offset_is_raised_once_and_exactly_there(log: InMemoryLog) -> None:
    log.abort_at(AT, 4, OSError("disk gone"))

    fetch = log.read({AT: 0}, max_records=100, timeout_s=0)

    assert [r.offset for r in fetch.records] == [0, 1, 2, 3]
    assert fetch.at_end == frozenset()
    with pytest.raises(OSError, match="disk gone"):
        log.read(fetch.positions, max_records=100, timeout_s=0)
    assert read(log, 4) == [4, 5, 6, 7, 8, 9]


def test_pause_hides_everything_until_resume(log: InMemoryLog) -> None:
    log.pause()

    fetch = log.read({AT: 0}, max_records=100, timeout_s=0)

    assert (fetch.records, fetch.positions, fetch.at_end) == ([], {AT: 0}, frozenset())

    waiting = threading.Timer(0.1, log.resume)
    waiting.start()
    started = time.monotonic()

    assert read(log, 0, timeout_s=100) == list(range(10))
    assert time.monotonic() - started < HANG_S

    waiting.join()


def test_an_end_can_be_set_and_lifted(log: InMemoryLog) -> None:
    log.set_end(AT, 6)

    fetch = log.read({AT: 0}, max_records=100, timeout_s=0)

    assert [r.offset for r in fetch.records] == [0, 1, 2, 3, 4, 5]
    assert fetch.at_end == {AT}
    assert log.end("t")[AT] == 6

    log.append("t", [OutRecord(b"more", (), 0)])

    assert read(log, 6) == []

    log.set_end(AT, None)

    assert read(log, 6) == [6, 7, 8, 9, 10]


def test_truncate_is_bounded_by_what_is_there(log: InMemoryLog) -> None:
    log.truncate(AT, 3)

    assert log.begin("t")[AT] == 3
    assert read(log, 3) == [3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="offset 2, expected 3 … 10"):
        log.truncate(AT, 2)


def test_a_deleted_record_is_a_gap(log: InMemoryLog) -> None:
    log.delete(AT, 0)
    log.delete(AT, 4)

    fetch = log.read({AT: 0}, max_records=100, timeout_s=0)

    assert [r.offset for r in fetch.records] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert (fetch.gaps, fetch.positions) == ({AT: 2}, {AT: 10})
    assert log.begin("t")[AT] == 1


def test_what_is_no_record_is_passed_and_reported(log: InMemoryLog) -> None:
    log.append_unreadable(AT, b"junk", "no record")

    fetch = log.read({AT: 9}, max_records=100, timeout_s=0)

    (bad,) = fetch.unreadable
    assert (bad.topic, bad.partition, bad.offset, bad.payload, bad.reason) == ("t", 0, 10, b"junk", "no record")
    assert ([r.offset for r in fetch.records], fetch.positions) == ([9], {AT: 11})


def test_a_topic_made_anew_is_empty_and_another_incarnation(log: InMemoryLog) -> None:
    before = log.incarnations("t")

    log.make_anew("t")

    assert log.end("t") == dict.fromkeys(before, 0)
    assert not set(before.values()) & set(log.incarnations("t").values())
