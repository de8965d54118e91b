"""Bad records through a real event log and the real trainer.

Guarantee shown: each kind of bad record ends in the dead-letter topic with its topic, partition, offset and reason, and
is counted in the ledger. The good records around it give exactly the weights that they give without it.
"""

import base64
import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smes.schema import Schema
from smes_io.redis_client import connect
from stream.codec.codec import encode_feedback, encode_impressions, headers
from stream.log.event_log import EventLog, Headers, OutRecord, TopicPartition
from stream.log.open_log import open_event_log
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS
from tests.integration.training import (
    Pairs,
    assert_same_weights,
    drain,
    fill,
    fill_servers,
    read_pairs,
    totals,
    train_in_process,
)
from tests.running import DEADLINE_S, read_config, write_config
from trainer.report import conservation_errors


@dataclass(frozen=True)
class Bad:
    """A record to be refused, and what its dead letter must contain."""

    topic: str
    value: bytes
    code: str
    reason: str
    field: str | None
    headers: Headers
    row: int | None = None


def bad_records(schema: Schema, pairs: Pairs) -> list[Bad]:
    """One record of every kind, made from good events under ids that the log does not have."""
    impressions, events = pairs[2]
    json_headers, arrow_headers = headers("json", schema), headers("arrow", schema)
    impression = json.loads(encode_impressions(impressions.take(slice(0, 1)), schema, "json", 1)[0].value)
    feedback = json.loads(encode_feedback(events.take(slice(0, 1)), schema, "json", 1)[0].value)
    impression["impression_id"] = feedback["impression_id"] = 10**12

    def changed(event: dict[str, Any], **changes: Any) -> bytes:
        after = {**event, **changes}
        return json.dumps({key: value for key, value in after.items() if value is not ...}).encode()

    row = impressions.take(np.array([0]))  # a copy
    row.impression_id[:] = 10**12 + 1
    row.event_time_ms[:] = -1
    bad_row = encode_impressions(row, schema, "arrow", 1)[0].value
    tomorrow_ms = round(time.time() * 1000) + 86_400_000
    watch = {"task": "watch_time", "value": -0.5}
    other = (("codec", b"json"), ("schema", b"0123456789abcdef"))
    return [
        Bad(IMPRESSIONS, b'{"impression_id": 1', "unparsable", "", None, json_headers),
        Bad(IMPRESSIONS, b"\xff\x00", "unparsable", "", None, json_headers),
        Bad(IMPRESSIONS, b"[1]", "unparsable", "expected a JSON object", None, ()),
        Bad(FEEDBACK, b"", "unparsable", "", None, ()),
        Bad(IMPRESSIONS, b"no stream", "unparsable", "", None, arrow_headers),
        Bad(IMPRESSIONS, changed(impression, user_id=...), "missing_field", "user_id: ", "user_id", json_headers),
        Bad(FEEDBACK, changed(feedback, task=...), "missing_field", "task: expected", "task", json_headers),
        Bad(FEEDBACK, changed(feedback, task="click", value=2), "label_range", "0 or 1", "value", json_headers),
        Bad(FEEDBACK, changed(feedback, **watch), "label_range", "expected 0 … 60", "value", json_headers),
        Bad(FEEDBACK, changed(feedback, task="wink"), "unknown_task", "expected one of click", "task", json_headers),
        Bad(IMPRESSIONS, changed(impression, item_id="seven"), "bad_id", "an integer", "item_id", json_headers),
        Bad(IMPRESSIONS, changed(impression, user_id=1.5), "bad_id", "an integer", "user_id", json_headers),
        Bad(IMPRESSIONS, changed(impression, user_id=2**63), "bad_id", "got 9223372036854775808", "user_id", ()),
        Bad(
            IMPRESSIONS,
            changed(impression, event_time_ms=tomorrow_ms),
            "future_time",
            "expected at most 300000 ms after the record's arrival",
            "event_time_ms",
            json_headers,
        ),
        Bad(FEEDBACK, changed(feedback, event_time_ms=0), "bad_time", "got 0", "event_time_ms", json_headers),
        Bad(IMPRESSIONS, changed(impression), "schema_mismatch", "got 0123456789abcdef", "schema", other),
        Bad(FEEDBACK, bad_row, "schema_mismatch", "got none", "schema", (("codec", b"arrow"),)),
        Bad(IMPRESSIONS, changed(impression), "unknown_codec", "'avro'", "codec", (("codec", b"avro"),)),
        Bad(IMPRESSIONS, bad_row, "bad_time", "expected Unix milliseconds", "event_time_ms", arrow_headers, row=0),
    ]


def read_topic(log: EventLog, topic: str) -> list[dict[str, Any]]:
    letters, positions = [], log.begin(topic)
    deadline = time.monotonic() + DEADLINE_S
    while positions != log.end(topic):
        assert time.monotonic() < deadline
        fetch = log.read(positions, max_records=1000, timeout_s=1)
        letters += [json.loads(record.value) for record in fetch.records]
        positions = fetch.positions
    return letters


@pytest.mark.parametrize("kind", ["redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_every_kind_of_bad_record_is_set_aside_and_the_rest_trains_as_if_it_were_not_there(
    kind: str, redis_url: str, namespace: str, world: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kafka = request.getfixturevalue("kafka_bootstrap") if kind == "kafka" else None
    config = read_config(write_config(tmp_path, redis_url, namespace, kafka=kafka))
    schema, pairs = config.schema_file().schema, read_pairs(config, world)
    bad = bad_records(schema, pairs)
    where: list[TopicPartition] = []
    offsets: list[int] = []
    with closing(open_event_log(config.event_log)) as log:
        fill(config, log, pairs[:3], "json")
        for i, each in enumerate(bad):
            at = TopicPartition(each.topic, i % 2)
            where.append(at)
            offsets.append(log.end(each.topic)[at])
            log.append(each.topic, [OutRecord(each.value, each.headers, at.partition)])
        fill(config, log, pairs[3:], "arrow")
        report = drain(config)
        letters = {(x["topic"], x["partition"], x["offset"]): x for x in read_topic(log, DEAD_LETTERS)}

    assert len(letters) == len(bad)
    for each, at, offset in zip(bad, where, offsets, strict=True):
        letter = letters[at.topic, at.partition, offset]
        assert (letter["code"], letter["field"], letter["row"]) == (each.code, each.field, each.row), each
        assert each.reason in letter["reason"]
        assert letter["reason"]
        assert letter["events"] == 1
        if each.row is None:
            assert base64.b64decode(letter["payload"]) == each.value
    impressions, feedback = totals(pairs)
    dead = {topic: sum(each.topic == topic for each in bad) for topic in (IMPRESSIONS, FEEDBACK)}
    assert conservation_errors(report) == []
    assert (report["events"]["impressions"], report["events"]["dead_lettered"]) == (
        impressions + dead[IMPRESSIONS],
        dead[IMPRESSIONS],
    )
    assert (report["feedback"]["received"], report["feedback"]["dead_lettered"]) == (
        feedback + dead[FEEDBACK],
        dead[FEEDBACK],
    )
    assert_same_weights(tmp_path / "checkpoints", train_in_process(config, pairs))


def test_nothing_but_bad_records_trains_nothing_and_loses_nothing(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    config = read_config(write_config(tmp_path, redis_url, namespace))
    bad = bad_records(config.schema_file().schema, read_pairs(config, world))
    with closing(open_event_log(config.event_log)) as log:
        fill(config, log, [], "json")
        for each in bad:
            log.append(each.topic, [OutRecord(each.value, each.headers, 0)])
        report = drain(config)
        assert len(read_topic(log, DEAD_LETTERS)) == len(bad)
    assert conservation_errors(report) == []
    assert report["version"] == 0
    assert report["events"]["dead_lettered"] + report["feedback"]["dead_lettered"] == len(bad)


def test_deleted_and_foreign_entries_are_counted_and_the_rest_trains(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    config = read_config(write_config(tmp_path, redis_url, namespace))
    pairs = read_pairs(config, world)
    fill_servers(config, pairs, "json")
    impressions, feedback = totals(pairs)
    with connect(redis_url, 20.0) as client:
        streams = [f"{{{namespace}}}:log:{topic}:0" for topic in (IMPRESSIONS, FEEDBACK)]
        for stream in streams:
            (entry, _) = client.xrange(stream, count=100)[-1]
            client.xdel(stream, entry)
        foreign = client.xadd(streams[0], {"hello": "world"}).decode()

    report = drain(config)

    assert conservation_errors(report) == []
    assert (report["events"]["gaps"], report["feedback"]["gaps"]) == (1, 1)
    assert (report["events"]["unreadable"], report["events"]["dead_lettered"]) == (1, 1)
    # What was deleted was never read; the feedback of that impression has none to belong to.
    assert report["events"]["impressions"] == impressions - 1 + 1
    assert report["feedback"]["received"] == feedback - 1
    with closing(open_event_log(config.event_log)) as log:
        (letter,) = read_topic(log, DEAD_LETTERS)
    assert (letter["code"], letter["place"]) == ("unreadable", f"entry {foreign}")
