"""``docs/reference/wire.md`` is true: its bytes, tables and programs, run from outside and read back by our decoder."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from fastapi import FastAPI

from feature_store.payload import PayloadContent
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.hashing import encode_id
from smes.schema import MISSING, Schema
from smes_client import load_schema
from smes_scorer.app import create_app
from smes_scorer.config import ScorerConfig
from stream.codec.codec import Decoded, decode
from stream.codec.record_headers import headers
from stream.log.event_log import EventLog, Record
from stream.log.kafka_log import KafkaLog
from stream.log.redis_entries import pack_headers
from stream.log.redis_log import RedisStreamsLog, connect_log
from stream.topics import FEEDBACK, IMPRESSIONS, partition_of
from tests.running import until
from tests.smes_scorer.conftest import listening as listening
from tests.smes_scorer.made_payloads import version_payload

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/wire.md").read_text()
SPLITMIX, KAFKA, ARROW, REDIS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHOWN = [4711, 3934009182551599478, 14, 3, 2, 5, 8, MISSING]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    file = tmp_path_factory.mktemp("wire") / "shop.yaml"
    [text] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    file.write_text(text)
    return load_schema(file)


def run_outside(program: str, folder: Path) -> None:
    """Run a program of the page, with its partition rule before it, where our packages cannot be imported."""
    done = subprocess.run([sys.executable, "-I", "-c", SPLITMIX + program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def read_back(log: EventLog, schema: Schema) -> Decoded:
    positions = {at: 0 for topic in (IMPRESSIONS, FEEDBACK) for at in log.begin(topic)}
    records = []
    while True:
        fetch = log.read(positions, max_records=100, timeout_s=1)
        records += fetch.records
        positions = fetch.positions
        assert not fetch.unreadable
        if fetch.at_end == positions.keys():
            return decode(records, schema)


def row(decoded: Decoded, n: int) -> list[int]:
    shown = decoded.impressions
    return [int(shown.impression_id[n]), *shown.ids[n].tolist()]


def check_example(decoded: Decoded, partitions: int) -> None:
    """The impression and the feedback of the page, in the partition of the rule."""
    assert (decoded.dead, decoded.unknown_fields) == ([], 0)
    assert row(decoded, 0) == SHOWN
    assert decoded.impressions.numerics.tolist() == [[19.5]]
    expected = partition_of(np.array([4711], np.int64), partitions)
    assert decoded.impressions.partition == decoded.feedback.partition == expected
    feedback = decoded.feedback
    assert (feedback.impression_id.tolist(), feedback.task.tolist(), feedback.value.tolist()) == ([4711], [0], [1])
    assert feedback.event_time_ms.tolist() == [1750000001500]


def test_the_hash_the_headers_and_the_examples_in_json(schema: Schema) -> None:
    assert f"Its hash is `{schema.hash}`" in PAGE
    [packed] = re.findall(r"^```\n((?:[0-9a-f]{2}[ \n])+)```$", PAGE, re.MULTILINE)
    assert bytes.fromhex(packed) == pack_headers(headers("json", schema))
    full, light, two, feedback = (text.encode() for text in re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S))
    log_records = [(IMPRESSIONS, full), (IMPRESSIONS, light), (IMPRESSIONS, two), (FEEDBACK, feedback)]
    decoded = decode([record(topic, value, schema) for topic, value in log_records], schema)

    assert (decoded.dead, decoded.unknown_fields) == ([], 0)
    assert row(decoded, 0) == SHOWN
    assert decoded.impressions.served_scores[0].tolist() == pytest.approx([0.25, 0.03, 3.5])
    assert decoded.impressions.ids[1].tolist() == [3934009182551599478, 15, MISSING, 2, *[MISSING] * 3]
    assert row(decoded, 2) == [4721, *SHOWN[1:]]
    assert row(decoded, 3) == [4722, SHOWN[1], 15, 7, *SHOWN[4:]]
    together = decoded.impressions.take(slice(2, 4))
    assert (together.request_id.tolist(), together.served_version.tolist()) == ([99, 99], [12, 12])
    assert together.served_scores[:, 0].tolist() == pytest.approx([0.1, 0.5])
    assert decoded.feedback.task.tolist() == [0]


def record(topic: str, value: bytes, schema: Schema) -> Record:
    return Record(topic, 0, 0, value, headers("json", schema), 1)


def test_the_partition_rule_and_its_test_vectors() -> None:
    rows = re.findall(r"^\| (-?\d+) \| `([0-9a-f]{16})` \| (\d) \| (\d) \| (\d) \|$", PAGE, re.MULTILINE)
    scope: dict[str, Any] = {}
    exec(SPLITMIX, scope)

    assert len(rows) == 7
    for key, mixed, *partitions in rows:
        assert f"{scope['splitmix64'](int(key)):016x}" == mixed
        ours = [int(partition_of(np.array([int(key)], np.int64), n)[0]) for n in (2, 3, 8)]
        assert ours == [int(mixed, 16) % n for n in (2, 3, 8)] == [int(each) for each in partitions]


@pytest.fixture
def redis_log(redis_url: str, namespace: str) -> Iterator[RedisStreamsLog]:
    log = RedisStreamsLog(connect_log(redis_url, timeout_s=30), namespace)
    yield log
    log.close()


def test_a_plain_xadd_just_works(
    schema: Schema, redis_log: RedisStreamsLog, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    for topic in (IMPRESSIONS, FEEDBACK):
        redis_log.ensure_topic(topic, 3)
    program = REDIS.replace("redis://127.0.0.1:6379/0", redis_url).replace("{smes}", f"{{{namespace}}}")
    with redis.Redis.from_url(redis_url) as server:
        before_ms = int(server.time()[0]) * 1000

    run_outside(program, tmp_path)

    decoded = read_back(redis_log, schema)
    check_example(decoded, 3)
    assert before_ms <= int(decoded.impressions.arrival_ms[0]) < before_ms + 60_000  # of the id that Redis chose
    assert redis_log.at_time(IMPRESSIONS, before_ms + 60_000) == redis_log.end(IMPRESSIONS)


def test_an_xadd_of_a_value_alone_and_of_another_schema(
    schema: Schema, redis_log: RedisStreamsLog, redis_url: str, namespace: str
) -> None:
    for topic in (IMPRESSIONS, FEEDBACK):
        redis_log.ensure_topic(topic, 1)
    event = json.dumps({"impression_id": 1, "user_id": 1, "item_id": 1, "event_time_ms": 1750000000000})
    with redis.Redis.from_url(redis_url) as server:
        server.xadd(f"{{{namespace}}}:log:impressions:0", {"v": event})
        server.xadd(f"{{{namespace}}}:log:impressions:0", {"v": event, "schema": "0123456789abcdef"})

    decoded = read_back(redis_log, schema)

    assert len(decoded.impressions) == 1
    assert [letter.code for letter in decoded.dead] == ["schema_mismatch"]


@pytest.mark.kafka
def test_a_plain_producer_of_kafka_just_works(
    schema: Schema, kafka_bootstrap: str, namespace: str, tmp_path: Path
) -> None:
    log = KafkaLog(kafka_bootstrap, namespace)
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 3)

    def outside(program: str) -> str:
        return program.replace("127.0.0.1:9092", kafka_bootstrap).replace('"smes.', f'"{namespace}.')

    run_outside(outside(KAFKA), tmp_path)
    check_example(read_back(log, schema), 3)
    run_outside(outside(ARROW), tmp_path)
    decoded = read_back(log, schema)
    log.close()

    shown = decoded.impressions.take(np.argsort(decoded.impressions.impression_id))
    assert (decoded.dead, decoded.unknown_fields) == ([], 0)
    assert shown.impression_id.tolist() == [1, 2, 3, 4711]
    assert shown.ids[:3, 3:].tolist() == [[2, 5, 8, MISSING], [MISSING] * 4, [1, 9, MISSING, MISSING]]
    assert shown.numerics[:2].tolist() == [[19.5], [3.25]]
    assert np.isnan(shown.numerics[2, 0])
    assert shown.partition[:3].tolist() == [0, 0, 0]


class PageModel:
    """Scores: the item's id modulo 10, the context's page, and how many tags there are."""

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        tags = (ids[:, 4:7] != MISSING).sum(axis=1)
        return np.stack([ids[:, 1] % 10, ids[:, 3], tags], axis=1).astype(np.float32)


def load(payloads: Iterable[PayloadContent], schema: Schema, before: object) -> PageModel:
    list(payloads)
    return PageModel()


def test_the_request_by_curl(
    schema: Schema,
    redis_url: str,
    namespace: str,
    listening: Any,
    tmp_path: Path,
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        marks = {"lineage": "a", "version": "1", "schema_hash": schema.hash}
        SnapshotStore(client, namespace).publish(
            version_payload(1, marks), lineage="a", version=1, schema_hash=schema.hash, step=1, created_ms=1
        )
    app: FastAPI = create_app(ScorerConfig(poll_s=0.05), schema, redis_url=redis_url, namespace=namespace, load=load)
    serving: AbstractContextManager[str] = listening(app)
    with serving as url, httpx.Client(base_url=url, timeout=60) as http:
        until(lambda: http.get("/health/ready").status_code == 200)
        [command] = re.findall(r"^```sh\n(curl .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        words = shlex.split(command.replace("\\\n", " ").replace("http://127.0.0.1:8000", url))
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)

    answer = json.loads(done.stdout)
    documented = re.findall(
        r"^\| `(\w+)`(?:, `(\w+)`)? \|", PAGE.partition("The answer:")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert {name for names in documented for name in names if name} == answer.keys()
    assert [item["item_id"] for item in answer["items"]] == [14, "sku-15"]
    last = float(encode_id("sku-15") % 10)
    assert [list(item["scores"].values()) for item in answer["items"]] == [[4.0, 2.0, 2.0], [last, 2.0, 2.0]]
