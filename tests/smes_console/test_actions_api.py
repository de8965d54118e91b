"""What Versions, Dead letters and Try it ask the console for, and what they make it do, on a real Redis.

What an action would do is said before it is done, and then that is done. Whatever is wrong is said in one line.
"""

import base64
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from feature_store.snapshots import SnapshotStore
from smes_cli.dead_letters import replayer_of
from smes_console.letter_catalog import Chosen, LetterCatalog
from smes_io.redis_client import connect
from stream.codec.codec import decode
from stream.dead_letters import DeadLetter, DeadLetterWriter
from stream.log.event_log import OutRecord
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.running import read_config, write_config
from tests.smes_console.consoles import bearer, console, places_on

TASKS = {"click": {"base_rate": 0.25, "positives": 5, "auc": 0.75, "ne": 0.9, "calibration": 1.5}}


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with closing(connect(redis_url, 10.0)) as client:
        yield client


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    return SnapshotStore(client, namespace)


def publish(store: SnapshotStore, version: int, held: str | None = None, **metrics: Any) -> None:
    store.publish(
        f"payload {version}".encode(),
        lineage="a",
        version=version,
        schema_hash="s",
        step=version,
        created_ms=1_700_000_000_000,
        metrics={"tasks": TASKS, **metrics},
        held=held,
    )


def decide(http: httpx.Client, action: str, **asked: Any) -> httpx.Response:
    return http.post("/api/versions/decide", headers=bearer(), json={"action": action, **asked})


def test_versions_are_listed_as_the_store_has_them_and_decisions_are_tried_before_they_are_made(
    store: SnapshotStore, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    with console(places_on(redis_url, namespace), tmp_path) as http:
        assert http.get("/api/versions").json()["versions"] == []
        assert decide(http, "rollback").status_code == 409
        for version in (1, 2, 3):
            publish(store, version, gate={"passed": version})
        publish(store, 4, held="click: NE 0.4 worse")
        time.sleep(2.1)  # the list counts for two seconds

        seen = http.get("/api/versions").json()
        assert [row["name"] for row in seen["versions"]] == ["a:4", "a:3", "a:2", "a:1"]
        assert {row["name"]: row["gate"] for row in seen["versions"]} == {
            "a:1": "passed",
            "a:2": "passed",
            "a:3": "passed",
            "a:4": "refused",
        }
        assert (seen["serves"], seen["current"], seen["pinned"], seen["problem"]) == ("a:3", "a:3", False, None)
        newest = seen["versions"][1]
        assert newest["figures"] == {"auc": 0.75, "ne": 0.9}
        assert newest["total_bytes"] == len("payload 3")
        task = http.get("/api/versions", params={"of": "task:click"}).json()
        assert task["versions"][1]["figures"]["calibration"] == 1.5
        assert http.get("/api/versions", params={"of": "task:nobody"}).json()["versions"][1]["figures"] is None
        one = http.get("/api/versions/one", params={"lineage": "a", "version": 3}).json()
        assert one["manifest"]["metrics"]["gate"] == {"passed": 3}
        assert one["loads"] == [{"name": "a:3", "kind": "full", "bytes": 9}]

        # Tried: nothing changes. Made: what was tried.
        tried = decide(http, "rollback", dry_run=True).json()
        assert (tried["decision"]["name"], tried["rolls_back"]) == ("a:2", ["a:3"])
        assert store.decisions() == ()
        made = decide(http, "rollback", version=2, lineage="a", why="worse", by="ann").json()
        assert made["decision"]["effect"] == "a:2 is pinned; what was published after it is rolled back"
        [decision] = store.decisions()
        assert (decision.action, decision.name, decision.why, decision.by) == ("rollback", "a:2", "worse", "ann")
        seen = http.get("/api/versions").json()
        assert (seen["serves"], seen["pinned"]) == ("a:2", True)
        assert [row["name"] for row in seen["versions"] if row["rolled_back"]] == ["a:3"]
        assert decide(http, "pin", version=3, dry_run=True).json()["was_rolled_back"] is True
        assert decide(http, "promote", version=4).json()["decision"]["name"] == "a:4"
        assert http.get("/api/versions").json()["versions"][0]["gate"] == "promoted"

        # What cannot be done is said, and not done.
        before = len(store.decisions())
        for action, asked, status, says in (
            ("unpin", {}, 409, "nothing is pinned"),
            ("pin", {"version": 99}, 409, "a:99"),
            ("pin", {}, 409, "expected a version"),
            ("explode", {}, 422, "Input should be"),
            ("pin", {"version": -1}, 422, "greater than or equal to 0"),
            ("pin", {"version": 1, "lineage": "../x"}, 422, "pattern"),
            ("pin", {"version": 1, "why": "x" * 1001}, 422, "at most 1000"),
            ("pin", {"version": 1, "why": "a\nb"}, 422, "pattern"),
            ("pin", {"version": 1, "by": "\x1b[31mann"}, 422, "pattern"),
            ("pin", {"version": 1, "surplus": 1}, 422, "Extra inputs"),
        ):
            answer = decide(http, action, **asked)
            assert (answer.status_code, says in answer.text) == (status, True), (action, answer.text)
        assert len(store.decisions()) == before
        assert "a:99" in http.get("/api/versions/one", params={"lineage": "a", "version": 99}).json()["problem"]


def test_letters_are_counted_shown_and_replayed_once(redis_url: str, namespace: str, tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, redis_url, namespace))
    schema = config.schema_file().schema
    good = {"impression_id": 7, "user_id": 1, "item_id": 2, "event_time_ms": 1_700_000_000_000}
    with closing(open_event_log(config.event_log)) as log:
        for topic in (IMPRESSIONS, FEEDBACK):
            log.ensure_topic(topic, 2)
        other = (("codec", b"json"), ("schema", b"0123456789abcdef"))
        log.append(IMPRESSIONS, [OutRecord(json.dumps(good).encode(), other, 1)])
        log.append(FEEDBACK, [OutRecord(b"\xff\x00", (("codec", b"json"),), 0)])
        begin = log.begin(IMPRESSIONS) | log.begin(FEEDBACK)
        records = log.read(begin, max_records=10, timeout_s=1).records
        writer = DeadLetterWriter(log)
        for _ in range(2):  # a trainer that went back writes them again
            writer.write(decode(records, schema).dead)

        places = places_on(
            redis_url, namespace, replayer=lambda log, adopt: replayer_of(config, log, adopt_schema=adopt)
        )
        with console(places, tmp_path) as http:
            seen = http.get("/api/letters").json()
            assert (seen["letters"], seen["events"], seen["replayed"], seen["problem"]) == (2, 2, 0, None)
            assert {(g["reason"], g["topic"], g["partition"], g["letters"]) for g in seen["groups"]} == {
                ("schema_mismatch", IMPRESSIONS, 1, 1),
                ("unparsable", FEEDBACK, 0, 1),
            }
            assert sum(seen["times"]["letters"]) == 2
            assert (seen["read"], seen["of"]) == (4, 4)
            only = http.get("/api/letters", params={"reason": "unparsable"}).json()
            assert [each["place"] for each in only["newest"]] == ["feedback/0/0"]
            assert http.get("/api/letters", params={"until_ms": 5}).json()["letters"] == 0
            assert http.get("/api/letters", params={"reason": "because"}).status_code == 422
            ids = {each["reason"]: each["id"] for each in seen["newest"]}
            letter = http.get("/api/letters/one", params={"id": ids["unparsable"]}).json()["letter"]
            assert base64.b64decode(letter["payload"]) == b"\xff\x00"
            shown = http.get("/api/letters/one", params={"id": ids["schema_mismatch"]}).json()["letter"]
            assert json.loads("\n".join(shown["lines"])) == good
            assert http.get("/api/letters/one", params={"id": "0" * 16}).status_code == 404

            def replay(**asked: Any) -> Any:
                return http.post("/api/letters/replay", headers=bearer(), json=asked).json()

            tried = replay(dry_run=True)
            assert (tried["chosen"], tried["appended"], tried["refused"]) == (
                2,
                0,
                {"schema_mismatch": 1, "unparsable": 1},
            )
            tried = replay(dry_run=True, adopt_schema=True)
            assert (tried["appended"], sum(log.end(IMPRESSIONS).values())) == (1, 1), "nothing was appended yet"
            done = replay(adopt_schema=True, ids=[ids["schema_mismatch"]])
            assert (done["appended"], done["lines"][0]) == (1, "1 letters chosen: 1 appended, with 1 events")
            assert sum(log.end(IMPRESSIONS).values()) == 2, "it is in the log again"
            assert replay(adopt_schema=True, ids=[ids["schema_mismatch"]])["replayed_before"] == 1
            assert http.get("/api/letters").json()["replayed"] == 1
            assert "ids" in http.post("/api/letters/replay", headers=bearer(), json={"ids": ["x"]}).text


def test_a_long_topic_is_read_in_parts_once_and_forgets_what_is_gone(
    client: redis.Redis, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    config = read_config(write_config(tmp_path, redis_url, namespace))
    with closing(open_event_log(config.event_log)) as log:
        log.ensure_topic(FEEDBACK, 2)
        writer = DeadLetterWriter(log)
        letters = [DeadLetter(FEEDBACK, i % 2, i, None, "unparsable", f"number {i}", None, b"{") for i in range(5000)]
        writer.write(letters)
        clock = iter(range(10_000))
        catalog = LetterCatalog(lambda: next(clock))
        catalog.refresh(log, 3)
        first = catalog.counts(Chosen(), 10)
        assert 0 < first["read"] == first["letters"] < first["of"] == 5000
        for _ in range(10):
            catalog.refresh(log, 3)
        counted = catalog.counts(Chosen(), 10)
        assert (counted["letters"], counted["read"], len(counted["newest"])) == (5000, 5000, 10)
        assert catalog.counts(Chosen(partition=1), 0)["letters"] == 2500
        assert sum(counted["times"]["letters"]) == 5000

        for stream in client.scan_iter(match=f"*{namespace}*dead_letters*", _type="stream"):
            client.xtrim(stream, maxlen=100, approximate=False)
        catalog.refresh(log, 3)
        counted = catalog.counts(Chosen(), 300)
        assert (counted["letters"], counted["read"], counted["of"], len(counted["newest"])) == (100, 100, 100, 100)


def test_a_request_that_nobody_can_answer_is_said_to_be(redis_url: str, namespace: str, tmp_path: Path) -> None:
    with console(places_on(redis_url, namespace), tmp_path) as http:
        form = http.get("/api/try_it").json()
        assert "no answer" in form["problem"]
        assert {feature["name"]: feature["kind"] for feature in form["schema"]["context"]} == {
            "tab": "id",
            "device": "id",
        }
        example = http.get("/api/try_it/example").json()
        assert (example["example"], "impressions" in example["problem"]) == (None, True)
        no_json = ("{", "[" * 10_000, "NaN", '{"user_id": 1e999}', '["\\ud800"]')
        for request, status, says in (("{}", 503, "no answer"), *((each, 422, "no JSON") for each in no_json)):
            answer = http.post("/api/try_it/explain", headers=bearer(), json={"request": request})
            assert (answer.status_code, says in answer.json()["detail"]) == (status, True), answer.text
