"""Damaged snapshots and junk beside them: the model in service stays, and what is broken is named."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest
import redis
import torch

from feature_store.manifest import Manifest
from feature_store.payload import PayloadContent
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.schema import Schema
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.loading import Load, load_table_model
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import Scorable
from tests.feature_store.test_damage import BESIDE, POINTER, Junk
from tests.smes_scorer.made_payloads import full_payload, marks_of, version_payload

Publish = Callable[..., Manifest]


class CountedLoads:
    """Loads as the scorer does, and counts."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.count = 0

    def __call__(self, payloads: Iterable[PayloadContent], schema: Schema, before: Scorable | None) -> Scorable:
        return self._load(self._counted(payloads), schema, before)

    def _counted(self, payloads: Iterable[PayloadContent]) -> Iterator[PayloadContent]:
        for payload in payloads:
            self.count += 1
            yield payload


@pytest.fixture
def now_s() -> list[float]:
    """What the loader's clock shows."""
    return [100.0]


@pytest.fixture
def loads(load: Load) -> CountedLoads:
    return CountedLoads(load)


@pytest.fixture
def swap_with(
    client: redis.Redis, namespace: str, schema: Schema, telemetry: Telemetry, now_s: list[float]
) -> Callable[[Load], HotSwap]:
    """Makes a loader without its thread."""

    def swap_with(load: Load) -> HotSwap:
        watcher, store = SnapshotWatcher(client, namespace), SnapshotStore(client, namespace)
        return HotSwap(
            store, watcher, schema, load, FirstAnswers(), telemetry, poll_s=0.1, monotonic_s=lambda: now_s[0]
        )

    return swap_with


@pytest.fixture
def swap(swap_with: Callable[[Load], HotSwap], loads: CountedLoads) -> HotSwap:
    return swap_with(loads)


def version_of(swap: HotSwap) -> int | None:
    return None if swap.served is None else swap.served.manifest.version


@pytest.mark.parametrize("junk", [*POINTER.values(), *BESIDE.values()], ids=[*POINTER, *BESIDE])
def test_junk_leaves_the_model_in_service_and_the_next_snapshot_is_loaded(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, swap: HotSwap, junk: Junk
) -> None:
    for version in (1, 2, 3):
        publish(store, version)
    swap.refresh()
    junk(client, f"{{{namespace}}}:snapshots:")

    swap.refresh()
    assert version_of(swap) == 3
    if junk in POINTER.values():
        assert swap.problem is not None

    publish(store, 4)
    swap.refresh()
    assert version_of(swap) == 4
    assert swap.problem is None


@pytest.mark.parametrize("junk", POINTER.values(), ids=POINTER)
def test_a_scorer_that_starts_beside_a_broken_pointer_serves_the_newest_snapshot_that_can_be_read(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, swap: HotSwap, junk: Junk
) -> None:
    for version in (1, 2, 3):
        publish(store, version)
    junk(client, f"{{{namespace}}}:snapshots:")

    swap.refresh()

    assert version_of(swap) in (2, 3)
    assert f"Redis key {{{namespace}}}:snapshots:current: " in str(swap.problem)


def lies_of(payload: bytes) -> dict[str, bytes]:
    """Payloads whose headers lie."""
    length = int.from_bytes(payload[:8], "little")
    deep = b'{"__metadata__": ' + b"[" * 100_000
    return {
        "a header longer than the payload": (10**9).to_bytes(8, "little") + payload[8:],
        "a header of 2^64 bytes": b"\xff" * 8 + payload[8:],
        "a header of nine megabytes": (9 * 2**20).to_bytes(8, "little") + b" " * (9 * 2**20),
        "a deep header": len(deep).to_bytes(8, "little") + deep,
        "no tensors": payload[: 8 + length],
        "more than the tensors": payload + b"more",
        "an empty header": (2).to_bytes(8, "little") + b"{}",
    }


LIES = list(lies_of(version_payload(2, {"lineage": "a", "version": "2"})))


@pytest.mark.parametrize("lie", LIES)
def test_bytes_that_make_no_model_are_tried_once(
    store: SnapshotStore, publish: Publish, swap: HotSwap, telemetry: Telemetry, now_s: list[float], lie: str
) -> None:
    publish(store, 1)
    swap.refresh()
    good = version_payload(2, {"lineage": "a", "version": "2"})
    publish(store, 2, payload=lies_of(good)[lie])

    for _ in range(3):
        swap.refresh()
        now_s[0] += 1e6

    assert version_of(swap) == 1
    assert "snapshot payload" in str(swap.problem)
    assert telemetry.value("load_failures_total") == 1


def test_damaged_bytes_are_tried_again_after_longer_and_longer_pauses(
    client: redis.Redis,
    namespace: str,
    store: SnapshotStore,
    publish: Publish,
    swap: HotSwap,
    telemetry: Telemetry,
    now_s: list[float],
) -> None:
    manifest = publish(store, 1)
    client.set(f"{{{namespace}}}:snapshots:chunk:{manifest.upload}:0", b"junk")

    for _ in range(3600):
        swap.refresh()
        now_s[0] += 1

    assert 5 <= telemetry.value("load_failures_total") <= 20
    assert "chunk 0 of 1: 4 bytes" in str(swap.problem)


def test_without_a_model_an_older_snapshot_serves_and_the_damage_is_named(
    store: SnapshotStore, publish: Publish, swap: HotSwap, loads: CountedLoads
) -> None:
    publish(store, 1)
    publish(store, 2)
    publish(store, 3, payload=b"junk")

    swap.refresh()
    assert version_of(swap) == 2
    assert "header cut short" in str(swap.problem)

    swap.refresh()
    assert "header cut short" in str(swap.problem)
    assert loads.count == 1

    publish(store, 4)
    swap.refresh()
    assert (version_of(swap), swap.problem) == (4, None)


def test_a_broken_manifest_between_two_versions_is_a_gap_of_freshness_and_no_more(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, swap: HotSwap, telemetry: Telemetry
) -> None:
    publish(store, 1)
    swap.refresh()
    for version in (2, 3, 4):
        publish(store, version)
    client.hset(f"{{{namespace}}}:snapshots:manifests", "a:2", "junk")

    swap.refresh()

    assert version_of(swap) == 4
    assert telemetry.value("freshness_uncounted_total") == 1


def real_payload(schema: Schema, model: dict[str, object] | None = None, **tensors: torch.Tensor) -> bytes:
    config = ModelConfig(ranker="shared_bottom")
    learner = Learner(schema, config, OptimizerConfig(), device=torch.device("cpu"))
    marks = marks_of(learner, 2) | {"model": json.dumps(config.to_dict() | (model or {}))}
    return full_payload(learner, 2, marks=marks, changed=tensors)


@pytest.mark.parametrize(
    ("model", "tensors", "message"),
    [
        ({"shared_bottom": {"dims": [24_000] * 8}}, {}, "expected at most"),
        ({"shared_bottom": {"dims": [4_000] * 8}}, {}, "asks for more than the"),
        ({"shared_bottom": "x"}, {}, "model configuration"),
        ({}, {"dense.heads.out_bias": torch.full((3,), torch.nan)}, "3 values are NaN or infinite"),
    ],
    ids=["layers of 24,000", "layers of 4,000", "no configuration", "NaN"],
)
def test_a_real_snapshot_that_lies_is_refused_once(
    store: SnapshotStore,
    schema: Schema,
    publish: Publish,
    swap_with: Callable[[Load], HotSwap],
    now_s: list[float],
    model: dict[str, object],
    tensors: dict[str, torch.Tensor],
    message: str,
) -> None:
    loads = CountedLoads(load_table_model)
    swap = swap_with(loads)
    publish(store, 2, payload=real_payload(schema, model, **tensors))

    for _ in range(3):
        swap.refresh()
        now_s[0] += 1e6

    assert swap.served is None
    assert message in str(swap.problem)
    assert loads.count == 1


def test_a_real_snapshot_serves(
    store: SnapshotStore, schema: Schema, publish: Publish, swap_with: Callable[[Load], HotSwap]
) -> None:
    swap = swap_with(load_table_model)
    publish(store, 2, payload=real_payload(schema))

    swap.refresh()

    assert (version_of(swap), swap.problem) == (2, None)


def test_a_payload_of_another_schema_than_its_manifest_says_is_refused(
    store: SnapshotStore, publish: Publish, swap_with: Callable[[Load], HotSwap]
) -> None:
    swap = swap_with(load_table_model)
    publish(store, 2)
    publish(store, 3, payload=version_payload(3, {"lineage": "a", "version": "3", "schema_hash": "0" * 16}))

    swap.refresh()

    assert f"schema hash {'0' * 16} differs" in str(swap.problem)


Ready = Callable[..., AbstractContextManager[httpx.Client]]


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"smes_scorer_{name} "))


def test_a_broken_pointer_is_degraded_in_health_and_metrics_until_the_next_publication(
    client: redis.Redis,
    namespace: str,
    store: SnapshotStore,
    publish: Publish,
    ready: Ready,
    until: Callable[[Callable[[], object]], None],
) -> None:
    publish(store, 1)
    with ready() as http:
        assert http.get("/health/ready").json()["status"] == "ready"
        assert metric(http, "degraded") == 0

        client.set(f"{{{namespace}}}:snapshots:current", "junk")
        until(lambda: metric(http, "degraded") == 1)
        health = http.get("/health/ready")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert "snapshots:current: 'junk', expected lineage:version" in health.json()["problems"]["snapshots"]
        assert metric(http, "store_damage") == 1
        assert http.post("/v1/score", json={"user_id": 1, "items": [1]}).json()["version"] == 1

        publish(store, 2)
        until(lambda: metric(http, "degraded") == 0)
        assert http.get("/health/live").status_code == 200


@pytest.mark.parametrize("row", [b"junk", b"\xff\xfe", b"", b"\xff" * 60])
def test_junk_for_stored_features_is_degraded_and_no_error(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, ready: Ready, row: bytes
) -> None:
    publish(store, 1)
    client.set(f"{{{namespace}}}:features:user:1", row)
    with ready(entity_timeout_ms=5000) as http:
        answers = [http.post("/v1/score", json={"user_id": 1, "items": [1, 2]}) for _ in range(3)]

        assert [answer.status_code for answer in answers] == [200] * 3
        assert [answer.json()["features_missing"]["user"] for answer in answers] == [["age"]] * 3
        assert metric(http, "degraded") == 1
        assert f"{{{namespace}}}:features:user:1: " in http.get("/health/ready").json()["problems"]["features"]
