"""The dead-letter topic: what a letter says there, how large it gets, and what is counted."""

import base64
import json

import pytest

from smes.errors import EventLogError
from smes.schema import Schema
from stream.codec.codec import decode
from stream.codec.validation import Problem
from stream.dead_letters import MAX_PAYLOAD_BYTES, SHORT_PAYLOAD_BYTES, DeadLetter, DeadLetterWriter, letter_id
from stream.log.event_log import OutRecord, Record, TopicPartition
from stream.log.memory_log import InMemoryLog
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS

LOG = "an incarnation"


def _letter(payload: bytes = b"x", *, code: str = "bad_id", partition: int = 0, events: int = 1) -> DeadLetter:
    record = Record("feedback", partition, 17, payload, (), 1)
    problem = Problem("bad_id" if code == "bad_id" else "unparsable", "expected an integer, got 'ü'", "item_id")
    return DeadLetter.of_record(record, problem, events=events)


def _log(partitions: int = 1) -> InMemoryLog:
    """With the topic that the letters' events were read from."""
    log = InMemoryLog(now_ms=lambda: 5)
    log.ensure_topic(FEEDBACK, partitions)
    return log


def _written(log: InMemoryLog, partition: int = 0) -> list[Record]:
    return log.read({TopicPartition(DEAD_LETTERS, partition): 0}, max_records=100, timeout_s=1.0).records


def test_a_refused_record_can_be_found_again_from_its_letter(wire_schema: Schema) -> None:
    log = InMemoryLog(now_ms=lambda: 5)
    writer = DeadLetterWriter(log)
    log.ensure_topic(IMPRESSIONS, 2)
    log.append(IMPRESSIONS, [OutRecord(b"{}", (), 1), OutRecord(b"\xff\x00", (), 1)])
    read = log.read({TopicPartition(IMPRESSIONS, 1): 0}, max_records=10, timeout_s=1.0).records
    writer.write(decode(read, wire_schema).dead)
    first, second = (json.loads(record.value) for record in _written(log))

    assert {key: first[key] for key in ("topic", "partition", "offset", "row", "code", "field", "events")} == {
        "topic": "impressions",
        "partition": 1,
        "offset": 0,
        "row": None,
        "code": "missing_field",
        "field": "impression_id",
        "events": 1,
    }
    assert first["reason"] == "impression_id: expected an integer, got nothing"
    assert base64.b64decode(second["payload"]) == read[second["offset"]].value == b"\xff\x00"
    assert (second["payload_bytes"], second["payload_truncated"]) == (2, False)


@pytest.mark.parametrize(("extra", "truncated"), [(0, False), (1, True)])
def test_a_payload_beyond_the_limit_is_cut_and_flagged(extra: int, truncated: bool) -> None:
    payload = bytes(range(256)) * (MAX_PAYLOAD_BYTES // 256) + b"y" * extra

    written = json.loads(_letter(payload).to_json(LOG))

    assert base64.b64decode(written["payload"]) == payload[:MAX_PAYLOAD_BYTES]
    assert (written["payload_bytes"], written["payload_truncated"]) == (len(payload), truncated)


def test_events_are_counted_by_topic_and_code() -> None:
    writer = DeadLetterWriter(_log())

    assert dict(writer.counts) == {}
    writer.write([_letter(), _letter(events=40), _letter(code="unparsable")])
    writer.write([])
    writer.write([_letter()])
    assert dict(writer.counts) == {("feedback", "bad_id"): 42, ("feedback", "unparsable"): 1}


def test_letters_are_spread_by_the_partition_of_their_events() -> None:
    log = _log(5)
    writer = DeadLetterWriter(log, partitions=2)

    writer.write([_letter(partition=p) for p in range(5)])

    assert [json.loads(r.value)["partition"] for r in _written(log, 0)] == [0, 2, 4]
    assert [json.loads(r.value)["partition"] for r in _written(log, 1)] == [1, 3]
    assert dict(_written(log, 0)[0].headers)["codec"] == b"json"


def test_nothing_is_counted_that_the_log_did_not_take() -> None:
    class Refusing(InMemoryLog):
        def append(self, topic: str, records: object) -> None:
            raise EventLogError(f"{topic}: no")

    log = Refusing()
    log.ensure_topic(FEEDBACK, 1)
    writer = DeadLetterWriter(log)

    with pytest.raises(EventLogError):
        writer.write([_letter()])
    assert dict(writer.counts) == {}


def test_copies_of_a_letter_have_one_id_and_no_other_letter_has_it() -> None:
    def of(topic: str, partition: int, offset: int, row: int | None) -> DeadLetter:
        record = Record(topic, partition, offset, b"x" * 2000, (), 1)
        problem = Problem("bad_id", "")
        return DeadLetter.of_record(record, problem) if row is None else DeadLetter.of_row(record, row, problem, b"{}")

    places = [
        (topic, partition, offset, row)
        for topic in (IMPRESSIONS, FEEDBACK)
        for partition in (0, 1)
        for offset in (0, 1, 11)
        for row in (None, 0, 1)
    ]
    ids = {letter_id(of(*place), log) for place in places for log in ("a", "b")}
    assert len(ids) == 2 * len(places)
    letter = of(FEEDBACK, 1, 11, None)
    copies = [json.loads(letter.to_json(LOG, size)) for size in (SHORT_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES)]
    assert copies[0]["id"] == copies[1]["id"] == letter_id(letter, LOG)
    assert copies[0]["payload"] != copies[1]["payload"]


def test_a_letter_of_another_log_of_the_same_name_is_another_letter() -> None:
    now_s = [0.0]
    log = _log()
    writer = DeadLetterWriter(log, monotonic=lambda: now_s[0])
    writer.write([_letter()])
    writer.write([_letter()])
    log.make_anew(FEEDBACK)
    now_s[0] += 1.0
    writer.write([_letter()])

    first, again, other = (json.loads(record.value) for record in _written(log))

    assert first == again
    assert first["log"] != other["log"] == log.incarnations(FEEDBACK)[TopicPartition(FEEDBACK, 0)]
    assert first["id"] != other["id"]


def test_a_letter_keeps_the_headers_unless_they_are_large() -> None:
    problem = Problem("bad_id", "")

    def kept(value: bytes) -> object:
        record = Record(FEEDBACK, 0, 1, b"", (("codec", b"json"), ("trace", value)), 7)
        written = json.loads(DeadLetter.of_record(record, problem).to_json(LOG))
        assert written["arrival_ms"] == 7
        return written["headers"]

    assert kept(b"\xff\x00") == [["codec", "json"], ["trace", "\xff\x00"]]
    assert kept(b"x" * 5000) is None
