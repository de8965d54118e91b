"""What the scorer answers, and what it refuses."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import numpy as np
import pytest
import redis
from fastapi import FastAPI

from feature_store.entities import EntityStore
from feature_store.snapshots import SnapshotStore
from smes.schema import Schema
from smes_scorer.config import ScorerConfig, fusion_weights

Ready = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    return SnapshotStore(client, namespace)


@pytest.fixture
def http(ready: Ready, store: SnapshotStore, publish: Callable[..., object]) -> Iterator[httpx.Client]:
    publish(store, 4)
    with ready(max_items=5) as http:
        yield http


def stats(http: httpx.Client) -> dict[str, object]:
    answer: dict[str, object] = http.get("/v1/stats").json()
    return answer


def test_an_answer(http: httpx.Client) -> None:
    answer = http.post("/v1/score", json={"user_id": 1, "items": [13, 27, 18]})
    assert answer.status_code == 200
    assert answer.json() == {
        "lineage": "a",
        "version": 4,
        "items": [
            {"item_id": 13, "scores": {"click": 4 + 3 / 16, "like": 2.0, "watch_s": 0.0}, "fused": 6 + 3 / 16},
            {"item_id": 27, "scores": {"click": 4 + 7 / 16, "like": 2.0, "watch_s": 0.0}, "fused": 6 + 7 / 16},
            {"item_id": 18, "scores": {"click": 4 + 8 / 16, "like": 2.0, "watch_s": 0.0}, "fused": 6 + 8 / 16},
        ],
        "ranking": [18, 27, 13],
    }


def test_stored_features_and_context_reach_the_model(
    http: httpx.Client, client: redis.Redis, namespace: str, schema: Schema
) -> None:
    store = EntityStore(client, schema, namespace)
    store.put_many("user", np.array([1]), {"age": np.array([0.5], np.float32)})
    store.put_many("item", np.array([10]), {"author": np.array([100])})
    request = {"user_id": 1, "items": [10, 20], "context": {"hour": 7, "tags": [1000, 2000, 9999], "battery": 0.25}}
    answer = http.post("/v1/score", json=request).json()
    # age + battery + hour + the two first tags; the author of the known item
    assert [item["scores"]["watch_s"] for item in answer["items"]] == [3107.75 + 0.0, 3007.75]
    counted = stats(http)
    assert (counted["unknown_users"], counted["unknown_items"]) == (0, 1)


def test_a_history_in_the_request_reaches_the_model_newest_first(http: httpx.Client) -> None:
    context = {"seen": [100, 200, 300, 4000], "outcomes": [1, 2, 3, 50]}
    answer = http.post("/v1/score", json={"user_id": 1, "items": [10], "context": context})
    assert answer.json()["items"][0]["scores"]["watch_s"] == 606.0  # the oldest is cut of both


def test_a_stored_time_reaches_the_model_as_days(
    http: httpx.Client, client: redis.Redis, namespace: str, schema: Schema
) -> None:
    store = EntityStore(client, schema, namespace)
    stored_s = np.array([time.time() - 50 * 86_400], np.float32)
    store.put_many("item", np.array([10]), {"days_out": stored_s})
    answer = http.post("/v1/score", json={"user_id": 1, "items": [10, 20]}).json()
    days = [item["scores"]["watch_s"] for item in answer["items"]]
    assert days == [pytest.approx((time.time() - float(stored_s[0])) / 86_400, abs=0.01), 0.0]


def test_unknown_users_and_items_are_scored_and_counted(http: httpx.Client) -> None:
    assert http.post("/v1/score", json={"user_id": -5, "items": [1, 2]}).status_code == 200
    counted = stats(http)
    assert (counted["unknown_users"], counted["unknown_items"]) == (1, 2)


def test_null_context_is_missing_and_unknown_names_are_counted(http: httpx.Client) -> None:
    context = {"hour": None, "tags": None, "battery": None, "colour": "blue", "age": 3, "user_id": 9}
    answer = http.post("/v1/score", json={"user_id": 1, "items": [1], "context": context})
    assert answer.json()["items"][0]["scores"]["watch_s"] == 0.0
    assert stats(http)["ignored_context"] == 3  # a user's feature comes from the store, not from the request


def test_fusion_weights_change_the_ranking(ready: Ready, store: SnapshotStore, publish: Callable[..., object]) -> None:
    publish(store, 1)
    with ready(fusion_weights={"click": -2.0, "watch_s": 0.5}) as http:
        answer = http.post("/v1/score", json={"user_id": 1, "items": [18, 13], "context": {"hour": 8}}).json()
    # weights −2, 1 (the default of a binary task), 0.5
    assert [item["fused"] for item in answer["items"]] == [-2 * 1.5 + 0.5 + 4, -2 * (1 + 3 / 16) + 0.5 + 4]
    assert answer["ranking"] == [13, 18]


def test_ties_keep_the_order_asked(http: httpx.Client) -> None:
    assert http.post("/v1/score", json={"user_id": 1, "items": [33, 13, 23]}).json()["ranking"] == [33, 13, 23]


@pytest.mark.parametrize(
    ("request_body", "loc"),
    [
        ({"items": [1]}, ["body", "user_id"]),
        ({"user_id": 1}, ["body", "items"]),
        ({"user_id": "1", "items": [1]}, ["body", "user_id"]),
        ({"user_id": 1.0, "items": [1]}, ["body", "user_id"]),
        ({"user_id": True, "items": [1]}, ["body", "user_id"]),
        ({"user_id": None, "items": [1]}, ["body", "user_id"]),
        ({"user_id": 2**63, "items": [1]}, ["body", "user_id"]),
        ({"user_id": -(2**63), "items": [1]}, ["body", "user_id"]),
        ({"user_id": 1, "items": []}, ["body", "items"]),
        ({"user_id": 1, "items": 3}, ["body", "items"]),
        ({"user_id": 1, "items": [1, "2"]}, ["body", "items", 1]),
        ({"user_id": 1, "items": [1, 2, 3, 4, 5, 6]}, ["body", "items"]),
        ({"user_id": 1, "items": [1], "item": [2]}, ["body", "item"]),
        ({"user_id": 1, "items": [1], "context": [1]}, ["body", "context"]),
        ({"user_id": 1, "items": [1], "context": {"hour": "7"}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"hour": 7.5}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"hour": False}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"hour": -(2**63)}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"tags": 7}}, ["body", "context", "tags"]),
        ({"user_id": 1, "items": [1], "context": {"tags": [1, "x"]}}, ["body", "context", "tags", 1]),
        ({"user_id": 1, "items": [1], "context": {"battery": "full"}}, ["body", "context", "battery"]),
        ({"user_id": 1, "items": [1], "context": {"battery": 1e300}}, ["body", "context", "battery"]),
        ({"user_id": 1, "items": [1], "context": {"battery": float("nan")}}, ["body", "context", "battery"]),
        ({"user_id": float("nan"), "items": [1]}, ["body", "user_id"]),
        ({"user_id": 1, "items": [1], "context": {"seen": [1, 2]}}, ["body", "context", "outcomes"]),
        ({"user_id": 1, "items": [1], "context": {"seen": [1], "outcomes": [0, 1]}}, ["body", "context", "outcomes"]),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, request_body: dict[str, object], loc: list[object]) -> None:
    answer = http.post("/v1/score", content=json.dumps(request_body), headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert [entry["loc"] for entry in answer.json()["detail"]] == [loc]
    assert answer.json()["detail"][0]["msg"]


def test_too_many_items_are_told_the_limit(http: httpx.Client) -> None:
    answer = http.post("/v1/score", json={"user_id": 1, "items": list(range(6))})
    assert answer.json()["detail"][0]["msg"] == "6 items, expected at most 5"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 20_000])
def test_a_body_that_is_no_request_is_the_callers_fault(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert stats(http)["errors"] == 0


def test_not_ready_before_the_first_snapshot(
    starting: Ready,
    until: Callable[..., None],
    store: SnapshotStore,
    publish: Callable[..., object],
) -> None:
    with starting() as http:
        assert http.get("/health/live").json() == {"status": "alive"}
        ready = http.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
        refused = http.post("/v1/score", json={"user_id": 1, "items": [1]})
        assert refused.status_code == 503
        assert refused.json() == {"detail": "not ready: no snapshot was published yet"}
        publish(store, 1)
        until(lambda: http.get("/health/ready").status_code == 200)
        assert http.get("/health/ready").json()["status"] == "ready"
        assert http.post("/v1/score", json={"user_id": 1, "items": [1]}).status_code == 200
        outcomes = stats(http)["outcomes"]
    assert outcomes == {"ok": 1, "rejected": 0, "not_ready": 1, "error": 0}


def test_counters_and_metrics(http: httpx.Client) -> None:
    for _ in range(3):
        http.post("/v1/score", json={"user_id": 1, "items": [1]})
    http.post("/v1/score", json={"user_id": "x", "items": [1]})
    counted = stats(http)
    assert counted["outcomes"] == {"ok": 3, "rejected": 1, "not_ready": 0, "error": 0}
    assert counted["requests"] == 4
    assert (counted["lineage"], counted["version"], counted["step"]) == ("a", 4, 40)
    assert counted["versions_answered"] == 1
    latency = counted["latency_ms"]
    assert isinstance(latency, dict)
    assert latency["count"] == 4
    assert 0 < latency["p50"] <= latency["p99"] < 20_000
    text = http.get("/metrics").text
    assert 'smes_scorer_requests_total{outcome="ok"} 3.0' in text
    assert "smes_scorer_served_version 4.0" in text
    assert 'smes_scorer_freshness_milliseconds_bucket{le="+Inf"} 0.0' in text
    age = next(line for line in text.splitlines() if line.startswith("smes_scorer_snapshot_age_seconds "))
    assert float(age.split()[1]) > 86_400  # cut in 2023


def test_a_large_body_is_refused_announced_or_not(starting: Ready) -> None:
    with starting(max_body_bytes=1000) as http:
        announced = http.post("/v1/score", content=b"x" * 1001)
        assert announced.status_code == 413
        assert announced.json() == {"detail": "request body over 1000 bytes (max_body_bytes)"}
        chunked = http.post("/v1/score", content=(b"x" * 100 for _ in range(11)))
        assert "content-length" not in chunked.request.headers
        assert chunked.status_code == 413
        fits = b'{"user_id": "' + b"x" * 985 + b'"}'
        assert len(fits) == 1000
        for content in (fits, iter([fits[:500], fits[500:]])):
            passed = http.post("/v1/score", content=content, headers={"content-type": "application/json"})
            assert passed.status_code == 422
        assert http.get("/v1/stats").json()["outcomes"]["rejected"] == 4


def test_an_unknown_task_in_the_fusion_weights_is_named(make_app: Callable[..., FastAPI]) -> None:
    with pytest.raises(ValueError, match=r"scorer\.fusion_weights: unknown task 'clik', expected one of \['click'"):
        make_app(fusion_weights={"clik": 1.0})


def test_default_fusion_weights(schema: Schema) -> None:
    assert fusion_weights(ScorerConfig(), schema).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_items": 0}, "scorer.max_items: 0, expected at least 1"),
        ({"poll_s": 0.0}, "scorer.poll_s: 0.0, expected more than 0"),
        ({"port": 70_000}, "scorer.port: 70000"),
        ({"fusion_weights": {"click": float("inf")}}, "scorer.fusion_weights.click: inf"),
    ],
)
def test_config_is_checked(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScorerConfig(**config)  # type: ignore[arg-type]  # wrong on purpose
