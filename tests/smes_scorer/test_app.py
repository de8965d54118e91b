"""What the scorer answers over HTTP, and what it refuses."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import pytest
import redis

from feature_store.entities import EntityStore
from feature_store.snapshots import SnapshotStore
from smes.hashing import encode_id
from smes.schema import Schema

Ready = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture
def entities(client: redis.Redis, namespace: str, schema: Schema) -> EntityStore:
    return EntityStore(client, schema, namespace)


@pytest.fixture
def http(ready: Ready, store: SnapshotStore, publish: Callable[..., object]) -> Iterator[httpx.Client]:
    publish(store, 4)
    with ready(max_items=5) as http:
        yield http


def stats(http: httpx.Client) -> dict[str, Any]:
    answer: dict[str, Any] = http.get("/v1/stats").json()
    return answer


def score(http: httpx.Client, request: dict[str, object]) -> httpx.Response:
    content = json.dumps(request)  # httpx itself refuses NaN
    return http.post("/v1/score", content=content, headers={"content-type": "application/json"})


def watch_s(answer: httpx.Response) -> list[float]:
    """The third score of each item: the sum of its features."""
    return [item["scores"]["watch_s"] for item in answer.json()["items"]]


def test_an_answer(http: httpx.Client) -> None:
    answer = score(http, {"user_id": 1, "items": [13, 27, 18]})

    assert answer.status_code == 200
    assert answer.json() == {
        "arm": "main",
        "lineage": "a",
        "version": 4,
        "items": [
            {"item_id": 13, "scores": {"click": 4 + 3 / 16, "like": 2.0, "watch_s": 0.0}, "fused": 6 + 3 / 16},
            {"item_id": 27, "scores": {"click": 4 + 7 / 16, "like": 2.0, "watch_s": 0.0}, "fused": 6 + 7 / 16},
            {"item_id": 18, "scores": {"click": 4 + 8 / 16, "like": 2.0, "watch_s": 0.0}, "fused": 6 + 8 / 16},
        ],
        "ranking": [18, 27, 13],
        "features_missing": {
            "user": ["age"],
            "context": ["hour", "tags", "battery", "seen", "outcomes"],
            "items": {"author": 3, "days_out": 3},
        },
    }


def test_ids_may_be_texts_and_the_answer_has_them_as_they_were_asked(http: httpx.Client, entities: EntityStore) -> None:
    entities.put("user", "anna", {"age": 0.5})
    entities.put("item", "a-17", {"author": "erika"})
    context = {"hour": "noon", "tags": ["new", 5], "seen": [10], "outcomes": ["none"]}

    texts = score(http, {"user_id": "anna", "items": ["a-17", "7", 8], "context": context}).json()
    ids = [encode_id(item) for item in ("a-17", "7", 8)]
    integers = score(
        http,
        {
            "user_id": encode_id("anna"),
            "items": ids,
            "context": {
                "hour": encode_id("noon"),
                "tags": [encode_id("new"), 5],
                "seen": [10],
                "outcomes": [encode_id("none")],
            },
        },
    ).json()

    assert [item["item_id"] for item in texts["items"]] == ["a-17", "7", 8]
    assert sorted(map(str, texts["ranking"])) == ["7", "8", "a-17"]
    assert [item["scores"] for item in texts["items"]] == [item["scores"] for item in integers["items"]]
    assert [ids[["a-17", "7", 8].index(item)] for item in texts["ranking"]] == integers["ranking"]
    assert texts["features_missing"] == {
        "user": [],
        "context": ["battery"],
        "items": {"author": 2, "days_out": 3},
    }


def test_stored_features_and_context_reach_the_model(http: httpx.Client, entities: EntityStore) -> None:
    entities.put_many("user", np.array([1]), {"age": np.array([0.5], np.float32)})
    entities.put_many("item", np.array([10]), {"author": np.array([100])})
    context = {"hour": 7, "tags": [1000, 2000, 9999], "battery": 0.25}

    answer = score(http, {"user_id": 1, "items": [10, 20], "context": context})

    # age + battery + hour + the two first tags; the author of the known item
    assert watch_s(answer) == [3107.75 + 0.0, 3007.75]
    assert (stats(http)["unknown_users"], stats(http)["unknown_items"]) == (0, 1)


def test_a_history_in_the_request_reaches_the_model_newest_first(http: httpx.Client) -> None:
    context = {"seen": [100, 200, 300, 4000], "outcomes": [1, 2, 3, 50]}

    answer = score(http, {"user_id": 1, "items": [10], "context": context})

    assert watch_s(answer) == [606.0]  # the oldest of both is cut off


def test_a_stored_time_reaches_the_model_as_days(http: httpx.Client, entities: EntityStore) -> None:
    stored_s = np.array([time.time() - 50 * 86_400], np.float32)
    entities.put_many("item", np.array([10]), {"days_out": stored_s})

    answer = score(http, {"user_id": 1, "items": [10, 20]})

    assert watch_s(answer) == [pytest.approx((time.time() - float(stored_s[0])) / 86_400, abs=0.01), 0.0]


def test_unknown_users_and_items_are_scored_and_counted(http: httpx.Client) -> None:
    answer = score(http, {"user_id": -5, "items": [1, 2]})

    assert answer.status_code == 200
    assert (stats(http)["unknown_users"], stats(http)["unknown_items"]) == (1, 2)


def test_null_context_is_missing(http: httpx.Client) -> None:
    answer = score(http, {"user_id": 1, "items": [1], "context": {"hour": None, "tags": None, "battery": None}})

    assert watch_s(answer) == [0.0]


def test_unknown_context_is_ignored_and_counted(http: httpx.Client) -> None:
    answer = score(http, {"user_id": 1, "items": [1], "context": {"colour": "blue", "age": 3, "user_id": 9}})

    assert watch_s(answer) == [0.0]  # a user's feature comes from the store, not from the request
    assert stats(http)["ignored_context"] == 3


def test_fusion_weights_change_the_ranking(ready: Ready, store: SnapshotStore, publish: Callable[..., object]) -> None:
    publish(store, 1)

    with ready(fusion_weights={"click": -2.0, "watch_s": 0.5}) as http:
        answer = score(http, {"user_id": 1, "items": [18, 13], "context": {"hour": 8}}).json()

    # weights −2, 1 (the default of a binary task), 0.5
    assert [item["fused"] for item in answer["items"]] == [-2 * 1.5 + 0.5 + 4, -2 * (1 + 3 / 16) + 0.5 + 4]
    assert answer["ranking"] == [13, 18]


def test_items_with_equal_scores_keep_the_order_of_the_request(http: httpx.Client) -> None:
    assert score(http, {"user_id": 1, "items": [33, 13, 23]}).json()["ranking"] == [33, 13, 23]


def test_only_the_best_items_and_the_scores_of_chosen_tasks_are_answered(http: httpx.Client) -> None:
    request = {"user_id": 1, "items": [13, 18, "17", 27], "tasks": ["watch_s", "click"], "top_k": 2}
    whole = score(http, {"user_id": 1, "items": request["items"]}).json()

    answer = score(http, request).json()
    more = score(http, {**request, "top_k": 99, "tasks": None}).json()
    explained = http.post("/v1/explain", json=request).json()

    assert answer["ranking"] == whole["ranking"][:2]
    assert answer["items"] == [
        {**item, "scores": {task: item["scores"][task] for task in ("watch_s", "click")}}
        for item in whole["items"]
        if item["item_id"] in answer["ranking"]
    ]
    assert list(answer["items"][0]["scores"]) == ["watch_s", "click"]
    assert answer["features_missing"] == whole["features_missing"]  # of all items that were scored
    assert more == whole
    assert [item["features"]["item_id"]["value"] for item in explained["items"]] == [
        encode_id(item["item_id"]) if isinstance(item["item_id"], str) else item["item_id"] for item in answer["items"]
    ]
    assert {name: explained[name] for name in ("version", "ranking")} == {
        name: answer[name] for name in ("version", "ranking")
    }
    assert [item["scores"] for item in explained["items"]] == [item["scores"] for item in answer["items"]]


@pytest.mark.parametrize(
    ("request_body", "loc"),
    [
        ({"items": [1]}, ["body", "user_id"]),
        ({"user_id": 1}, ["body", "items"]),
        ({"user_id": "", "items": [1]}, ["body", "user_id"]),
        ({"user_id": 1.0, "items": [1]}, ["body", "user_id"]),
        ({"user_id": True, "items": [1]}, ["body", "user_id"]),
        ({"user_id": None, "items": [1]}, ["body", "user_id"]),
        ({"user_id": 2**63, "items": [1]}, ["body", "user_id"]),
        ({"user_id": 2**64, "items": [1]}, ["body", "user_id"]),
        ({"user_id": -(2**63), "items": [1]}, ["body", "user_id"]),
        ({"user_id": 1, "items": []}, ["body", "items"]),
        ({"user_id": 1, "items": 3}, ["body", "items"]),
        ({"user_id": 1, "items": [1, ""]}, ["body", "items", 1]),
        ({"user_id": 1, "items": [1, 2, 3, 4, 5, 6]}, ["body", "items"]),
        ({"user_id": 1, "items": [1], "item": [2]}, ["body", "item"]),
        ({"user_id": 1, "items": [1], "top_k": 1.5}, ["body", "top_k"]),
        ({"user_id": 1, "items": [1], "tasks": ["click", "share"]}, ["body", "tasks", 1]),
        ({"user_id": 1, "items": [1], "context": [1]}, ["body", "context"]),
        ({"user_id": 1, "items": [1], "context": None}, ["body", "context"]),
        ({"user_id": 1, "items": [1], "context": {"hour": ["7"]}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"hour": 7.5}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"hour": 7.0}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"hour": False}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"hour": -(2**63)}}, ["body", "context", "hour"]),
        ({"user_id": 1, "items": [1], "context": {"tags": 7}}, ["body", "context", "tags"]),
        ({"user_id": 1, "items": [1], "context": {"tags": [1, ""]}}, ["body", "context", "tags", 1]),
        ({"user_id": 1, "items": [1], "context": {"battery": "full"}}, ["body", "context", "battery"]),
        ({"user_id": 1, "items": [1], "context": {"battery": True}}, ["body", "context", "battery"]),
        ({"user_id": 1, "items": [1], "context": {"battery": 1e300}}, ["body", "context", "battery"]),
        ({"user_id": 1, "items": [1], "context": {"battery": 10**300}}, ["body", "context", "battery"]),
        ({"user_id": 1, "items": [1], "context": {"battery": float("nan")}}, ["body", "context", "battery"]),
        ({"user_id": 1, "items": [1], "context": {"battery": float("-inf")}}, ["body", "context", "battery"]),
        ({"user_id": float("nan"), "items": [1]}, ["body", "user_id"]),
        ({"user_id": 1, "items": [1], "context": {"seen": [1, 2]}}, ["body", "context", "outcomes"]),
        ({"user_id": 1, "items": [1], "context": {"seen": [1], "outcomes": [0, 1]}}, ["body", "context", "outcomes"]),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, request_body: dict[str, object], loc: list[object]) -> None:
    answer = score(http, request_body)

    assert answer.status_code == 422, answer.text
    [problem] = answer.json()["detail"]
    assert problem.keys() == {"type", "loc", "msg"}
    assert problem["loc"] == loc
    assert problem["msg"]


def test_too_many_items_are_refused_with_the_limit(http: httpx.Client) -> None:
    answer = score(http, {"user_id": 1, "items": list(range(6))})

    assert answer.json()["detail"][0]["msg"] == "6 items, expected at most 5"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 20_000])
def test_a_body_that_is_no_request_is_a_mistake_of_the_caller(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/score", content=body, headers={"content-type": "application/json"})

    assert answer.status_code in (400, 422)
    assert stats(http)["errors"] == 0


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "application/a+json"])
def test_a_json_content_type_is_accepted(http: httpx.Client, content_type: str) -> None:
    body = b'{"user_id": 1, "items": [1]}'

    assert http.post("/v1/score", content=body, headers={"content-type": content_type}).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}, {"content-type": "json"}])
def test_another_content_type_is_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    answer = http.post("/v1/score", content=b'{"user_id": 1, "items": [1]}', headers=headers)

    assert answer.status_code == 422
    assert "expected application/json" in answer.json()["detail"][0]["msg"]


def test_not_ready_before_the_first_snapshot(starting: Ready) -> None:
    with starting() as http:
        alive = http.get("/health/live")
        ready = http.get("/health/ready")
        refused = score(http, {"user_id": 1, "items": [1]})
        outcomes = stats(http)["outcomes"]

    assert alive.json() == {"status": "alive"}
    assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
    assert refused.status_code == 503
    assert refused.json() == {"detail": "not ready: no snapshot was published yet"}
    assert outcomes == {"ok": 0, "rejected": 0, "not_ready": 1, "busy": 0, "dropped": 0, "error": 0}


def test_ready_after_the_first_snapshot(
    starting: Ready, until: Callable[..., None], store: SnapshotStore, publish: Callable[..., object]
) -> None:
    with starting() as http:
        publish(store, 1)
        until(lambda: http.get("/health/ready").status_code == 200)

        assert http.get("/health/ready").json()["status"] == "ready"
        assert score(http, {"user_id": 1, "items": [1]}).status_code == 200


@pytest.fixture
def used(http: httpx.Client) -> httpx.Client:
    """A scorer that answered three requests and refused one."""
    for _ in range(3):
        score(http, {"user_id": 1, "items": [1]})
    score(http, {"user_id": 1.5, "items": [1]})
    return http


def test_stats_count_the_requests(used: httpx.Client) -> None:
    counted = stats(used)

    assert counted["outcomes"] == {"ok": 3, "rejected": 1, "not_ready": 0, "busy": 0, "dropped": 0, "error": 0}
    assert counted["requests"] == 4
    assert counted["versions_answered"] == 1


def test_stats_name_the_version_in_service(used: httpx.Client) -> None:
    counted = stats(used)

    assert (counted["lineage"], counted["version"], counted["step"]) == ("a", 4, 40)


def test_stats_have_quantiles_of_the_latency(used: httpx.Client) -> None:
    latency = stats(used)["latency_ms"]

    assert latency["count"] == 4
    assert 0 < latency["p50"] <= latency["p99"] < 60_000


def test_metrics_for_prometheus(used: httpx.Client) -> None:
    text = used.get("/metrics").text

    assert 'smes_scorer_requests_total{outcome="ok"} 3.0' in text
    assert "smes_scorer_served_version 4.0" in text
    assert 'smes_scorer_freshness_milliseconds_bucket{le="+Inf"} 0.0' in text
    age = next(line for line in text.splitlines() if line.startswith("smes_scorer_snapshot_age_seconds "))
    assert float(age.split()[1]) > 86_400  # cut in 2023


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_large_body_is_refused(starting: Ready, chunked: bool) -> None:
    body = b"x" * 1001

    with starting(max_body_bytes=1000) as http:
        answer = http.post("/v1/score", content=iter([body[:500], body[500:]]) if chunked else body)
        rejected = stats(http)["outcomes"]["rejected"]

    assert ("content-length" in answer.request.headers) != chunked
    assert answer.status_code == 413
    assert answer.json() == {"detail": "request body over 1000 bytes (max_body_bytes)"}
    assert rejected == 1


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_of_the_largest_size_is_read(starting: Ready, chunked: bool) -> None:
    body = b'{"user_id": "' + b"x" * 985 + b'"}'
    assert len(body) == 1000

    with starting(max_body_bytes=1000) as http:
        content = iter([body[:500], body[500:]]) if chunked else body
        answer = http.post("/v1/score", content=content, headers={"content-type": "application/json"})

    assert answer.status_code == 422  # read, and refused for what it says


def test_a_store_without_features_is_a_problem_until_it_has_some(
    ready: Ready,
    until: Callable[..., None],
    store: SnapshotStore,
    publish: Callable[..., object],
    entities: EntityStore,
    client: redis.Redis,
) -> None:
    publish(store, 4)
    with ready(entity_check_s=0.05) as http:
        assert http.get("/health/ready").json()["status"] == "ready"
        entities.clear()
        until(lambda: http.get("/health/ready").json()["problems"]["features"])
        health = http.get("/health/ready")

        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert health.json()["problems"]["features"] == (
            "the store holds none, and the schema has stored ones: age, author, days_out"
        )
        assert "smes_scorer_feature_store_empty 1.0" in http.get("/metrics").text

        entities.put("user", 1, {"age": 3})
        until(lambda: http.get("/health/ready").json()["status"] == "ready")
        assert "smes_scorer_feature_store_empty 0.0" in http.get("/metrics").text


def test_a_look_up_that_finds_features_ends_the_problem_at_once(
    ready: Ready,
    until: Callable[..., None],
    store: SnapshotStore,
    publish: Callable[..., object],
    entities: EntityStore,
) -> None:
    publish(store, 4)
    with ready(fill_store=False, entity_check_s=3600.0) as http:
        until(lambda: http.get("/health/ready").json()["problems"]["features"])
        entities.put("item", 1, {"author": 3})
        score(http, {"user_id": 1, "items": [1]})

        assert http.get("/health/ready").json()["status"] == "ready"
