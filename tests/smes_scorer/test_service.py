"""The scorer as a process of its own, with a real learner's weights."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
import torch

from feature_store.entities import EntityStore
from feature_store.payload import encode
from feature_store.snapshots import SnapshotStore
from smes.errors import FeatureStoreUnavailable, SchemaMismatch, SmesError, SnapshotError
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.rankers.sparse.config import SmesConfig
from smes.schema import MISSING, Feature, Schema, Task
from smes_scorer.config import ScorerConfig
from smes_scorer.served import load_serving_model
from smes_scorer.service import serve

Until = Callable[[Callable[[], object]], None]
_ROOT = Path(__file__).parents[2]

SCHEMA = Schema(
    name="service-test",
    tasks=(Task("click"), Task("like"), Task("watch_s", kind="regression", max_value=600.0)),
    features=(
        Feature("age", "numeric", source="user"),
        Feature("tags", "bag", source="item", max_length=3),
        Feature("hour", "id"),
    ),
)
MODEL = ModelConfig(embedding_dim=8, head_dim=8, smes=SmesConfig())
USERS, ITEMS = 20, 50

_SERVE = """
import json, sys
from smes_scorer.config import ScorerConfig
from smes_scorer.service import serve
from smes.schema import Schema
schema = Schema.from_dict(json.loads(sys.argv[1]))
serve(ScorerConfig(port=0, poll_s=0.05), schema, redis_url=sys.argv[2], namespace=sys.argv[3],
      on_listening=lambda url: print(url, flush=True))
"""


@contextmanager
def scorer_process(redis_url: str, namespace: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, URL) of a scorer that was started like a user's."""
    arguments = [sys.executable, "-c", _SERVE, json.dumps(SCHEMA.to_dict()), redis_url, namespace]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, cwd=_ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def examples(n: int, seed: int) -> ExampleBlock:
    rng = np.random.default_rng(seed)
    block = ExampleBlock.empty(SCHEMA, n)
    block.ids[:, 0] = rng.integers(USERS, size=n)
    block.ids[:, 1] = rng.integers(ITEMS, size=n)
    block.ids[:, 2:4] = tags(block.ids[:, 1])
    block.ids[:, 5] = rng.integers(24, size=n)
    block.numerics[:, 0] = ages(block.ids[:, 0])
    block.labels[:, :2] = rng.random((n, 2)) < 0.3
    block.labels[:, 2] = rng.random(n) * 60
    return block


def tags(item_ids: np.ndarray) -> np.ndarray:
    return np.stack([item_ids % 7, np.where(item_ids % 2 == 0, MISSING, item_ids % 5)], axis=1)


def ages(user_ids: np.ndarray) -> np.ndarray:
    return (user_ids * 3.5).astype(np.float32)


def payload_of(learner: Learner, version: int) -> bytes:
    metadata = {
        "schema": json.dumps(SCHEMA.to_dict()),
        "schema_hash": SCHEMA.hash,
        "model": json.dumps(MODEL.to_dict()),
        "lineage": "a",
        "version": str(version),
    }
    return encode(learner.serving_state(), metadata)


def serves(http: httpx.Client, version: int) -> bool:
    health = http.get("/health/ready").json()
    assert not any(health["problems"].values()), health
    return bool(health["version"] == version)


def new_learner() -> Learner:
    return Learner(SCHEMA, MODEL, OptimizerConfig(), device=torch.device("cpu"), seed=3)


def publish(store: SnapshotStore, learner: Learner) -> None:
    version = learner.step_number
    store.publish(
        payload_of(learner, version), lineage="a", version=version, schema_hash=SCHEMA.hash, step=version, created_ms=1
    )


def test_what_the_learner_learned_is_what_the_scorer_answers(
    redis_url: str, namespace: str, client: redis.Redis, until: Until
) -> None:
    store, learner = SnapshotStore(client, namespace), new_learner()
    entities = EntityStore(client, SCHEMA, namespace)
    user_ids, item_ids = np.arange(USERS), np.arange(ITEMS)
    padded = np.full((ITEMS, 3), MISSING)
    padded[:, :2] = tags(item_ids)
    entities.put_many("user", user_ids, {"age": ages(user_ids)})
    entities.put_many("item", item_ids, {"tags": padded})
    asked = [*range(0, ITEMS, 3), 10_000]  # the last was never seen
    with scorer_process(redis_url, namespace) as (_, url), httpx.Client(base_url=url, timeout=20) as http:
        for seed in range(3):
            for step in range(5):
                learner.step(learner.prepare(examples(64, seed * 10 + step)))
            publish(store, learner)
            version = learner.step_number
            until(partial(serves, http, version))
            answer = http.post("/v1/score", json={"user_id": 4, "items": asked, "context": {"hour": 7}}).json()

            n = len(asked)
            ids = np.full((n, SCHEMA.id_width), MISSING)
            ids[:, 0], ids[:, 1], ids[:, 5] = 4, asked, 7
            ids[:-1, 2:4] = tags(np.array(asked[:-1]))
            numerics = np.full((n, 1), 14.0, np.float32)
            expected = ServingModel(SCHEMA, MODEL, learner.serving_state()).score(ids, numerics)
            assert answer["version"] == version
            scores = [[item["scores"][t.name] for t in SCHEMA.tasks] for item in answer["items"]]
            np.testing.assert_allclose(np.array(scores, np.float32), expected, rtol=2e-5, atol=1e-7)
            fused = expected[:, 0] + expected[:, 1]
            assert answer["ranking"] == [asked[i] for i in np.argsort(-fused, kind="stable")]
            assert expected[:, 0].std() > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_with_requests_in_flight(
    redis_url: str, namespace: str, client: redis.Redis, until: Until, number: signal.Signals
) -> None:
    learner = new_learner()
    learner.step(learner.prepare(examples(64, 0)))
    publish(SnapshotStore(client, namespace), learner)
    with scorer_process(redis_url, namespace) as (process, url):
        with httpx.Client(base_url=url, timeout=20) as http:
            until(partial(serves, http, learner.step_number))
        begun = threading.Event()
        answered: list[int] = []
        refused: list[type[httpx.TransportError]] = []

        def ask() -> None:
            with httpx.Client(base_url=url, timeout=20) as http:
                while True:
                    try:
                        answer = http.post("/v1/score", json={"user_id": 1, "items": list(range(500))})
                    except httpx.TransportError as error:
                        refused.append(type(error))
                        return
                    answered.append(answer.status_code)
                    begun.set()

        asker = threading.Thread(target=ask)
        asker.start()
        assert begun.wait(20)
        process.send_signal(number)
        assert process.wait(20) == 0
        asker.join()
    # All that were begun were answered; then there was nobody to connect to.
    assert set(answered) == {200}
    assert refused[0] in (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError)


def test_a_taken_port_is_named(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SmesError, match=f"scorer: cannot listen on 127.0.0.1:{port}: Address already in use"):
            serve(ScorerConfig(port=port), SCHEMA, redis_url=redis_url)


def test_redis_not_reachable_at_the_start_is_a_clear_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(
        FeatureStoreUnavailable, match=rf"redis://:\*\*\*@127.0.0.1:{port}/0 gave no answer within 0\.3 s"
    ):
        serve(ScorerConfig(port=0, redis_timeout_s=0.3), SCHEMA, redis_url=f"redis://:secret@127.0.0.1:{port}")


def test_loading_names_what_does_not_fit() -> None:
    learner = new_learner()
    learner.step(learner.prepare(examples(8, 0)))
    payload = payload_of(learner, 1)
    other = Schema(name="other", tasks=SCHEMA.tasks)
    with pytest.raises(SchemaMismatch, match=rf"{SCHEMA.hash} differs .* {other.hash}"):
        load_serving_model(payload, other)
    good = {"schema_hash": SCHEMA.hash, "model": json.dumps(MODEL.to_dict())}
    state = learner.serving_state()
    for metadata, tensors, message in (
        ({"schema_hash": SCHEMA.hash}, state, "model configuration: 'model'"),
        ({**good, "model": "{"}, state, "model configuration"),
        ({**good, "model": '{"colour": 1}'}, state, "unknown key 'colour'"),
        (good, {k: v for k, v in state.items() if k != "table.keys"}, "serving tensors"),
    ):
        with pytest.raises(SnapshotError, match=message):
            load_serving_model(encode(tensors, metadata), SCHEMA)
