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
from feature_store.snapshots import SnapshotStore
from smes.errors import FeatureStoreUnavailable, SmesError
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.rankers.sparse.config import SmesConfig
from smes.schema import MISSING, Feature, Schema, Task
from smes_scorer.config import ScorerConfig
from smes_scorer.service import serve
from tests.smes_scorer.made_payloads import delta_payload, full_payload

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
from tests.smes_scorer.made_payloads import delta_payload, full_payload
from smes.schema import Schema
schema = Schema.from_dict(json.loads(sys.argv[1]))
serve(ScorerConfig(port=0, poll_s=0.05, entity_timeout_ms=60_000), schema, redis_url=sys.argv[2], namespace=sys.argv[3],
      on_listening=lambda url: print(url, flush=True))
"""


@contextmanager
def scorer_process(redis_url: str, namespace: str, code: str = _SERVE) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, URL) of a scorer, started as a user starts one."""
    arguments = [sys.executable, "-P", "-c", code, json.dumps(SCHEMA.to_dict()), redis_url, namespace]
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


def serves(http: httpx.Client, version: int) -> bool:
    health = http.get("/health/ready").json()
    assert not any(health["problems"].values()), health
    return bool(health["version"] == version)


def new_learner() -> Learner:
    return Learner(SCHEMA, MODEL, OptimizerConfig(), device=torch.device("cpu"), seed=3)


def publish(store: SnapshotStore, learner: Learner, after: int | None = None) -> None:
    """All weights, or what changed since the version ``after``."""
    version, delta = learner.step_number, learner.take_delta()
    store.publish(
        full_payload(learner, version) if after is None else delta_payload(learner, version, delta),
        lineage="a",
        version=version,
        schema_hash=SCHEMA.hash,
        step=version,
        created_ms=1,
        applies_to=None if after is None else {after},
    )


def test_the_scorer_answers_with_the_scores_of_the_learners_weights(
    redis_url: str, namespace: str, client: redis.Redis, until: Until
) -> None:
    store, learner = SnapshotStore(client, namespace), new_learner()
    entities = EntityStore(client, SCHEMA, namespace)
    user_ids, item_ids = np.arange(USERS), np.arange(ITEMS)
    padded = np.full((ITEMS, 3), MISSING)
    padded[:, :2] = tags(item_ids)
    entities.put_many("user", user_ids, {"age": ages(user_ids)})
    entities.put_many("item", item_ids, {"tags": padded})
    items = [*range(0, ITEMS, 3), 10_000]  # the last was never seen
    request = {"user_id": 4, "items": items, "context": {"hour": 7}}
    ids = np.full((len(items), SCHEMA.id_width), MISSING)
    ids[:, 0], ids[:, 1], ids[:, 5] = 4, items, 7
    ids[:-1, 2:4] = tags(np.array(items[:-1]))
    numerics = np.full((len(items), 1), 14.0, np.float32)

    with scorer_process(redis_url, namespace) as (_, url), httpx.Client(base_url=url, timeout=60) as http:
        for seed in range(4):
            for step in range(5):
                learner.step(learner.prepare(examples(64, seed * 10 + step)))
            publish(store, learner, after=learner.step_number - 5 if seed else None)
            until(partial(serves, http, learner.step_number))
            answer = http.post("/v1/score", json=request).json()

            expected = ServingModel.from_state(SCHEMA, MODEL, learner.serving_state()).score(ids, numerics)
            assert answer["version"] == learner.step_number
            scores = [[item["scores"][t.name] for t in SCHEMA.tasks] for item in answer["items"]]
            np.testing.assert_allclose(np.array(scores, np.float32), expected, rtol=2e-5, atol=1e-7)
            fused = expected[:, 0] + expected[:, 1]
            assert answer["ranking"] == [items[i] for i in np.argsort(-fused, kind="stable")]
            assert expected[:, 0].std() > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_with_requests_in_flight(
    redis_url: str, namespace: str, client: redis.Redis, until: Until, number: signal.Signals
) -> None:
    learner = new_learner()
    learner.step(learner.prepare(examples(64, 0)))
    publish(SnapshotStore(client, namespace), learner)
    EntityStore(client, SCHEMA, namespace).put("user", 1, {"age": 3.5})
    begun = threading.Event()
    answered: list[int] = []
    refused: list[type[httpx.TransportError]] = []

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            while True:
                try:
                    answer = http.post("/v1/score", json={"user_id": 1, "items": list(range(500))})
                except httpx.TransportError as error:
                    refused.append(type(error))
                    return
                answered.append(answer.status_code)
                begun.set()

    with scorer_process(redis_url, namespace) as (process, url):
        with httpx.Client(base_url=url, timeout=60) as http:
            until(partial(serves, http, learner.step_number))
        asker = threading.Thread(target=ask, args=(url,))
        asker.start()
        assert begun.wait(60)
        process.send_signal(number)
        exit_code = process.wait(60)
        asker.join()

    assert exit_code == 0
    # Every request that began was answered; then there was nobody to connect to.
    assert set(answered) == {200}
    assert refused[0] in (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError)


_COUNTING = """
import gc, json, sys
import numpy as np
from smes.schema import Schema
from smes_scorer.config import ScorerConfig
from smes_scorer.service import serve

class Model:  # scores are how many objects the collector looks at
    def score(self, ids, numerics, now_ms):
        return np.full((len(ids), 3), len(gc.get_objects()), np.float32)

serve(ScorerConfig(port=0, poll_s=0.05), Schema.from_dict(json.loads(sys.argv[1])), redis_url=sys.argv[2],
      namespace=sys.argv[3], load=lambda payloads, schema, before: Model(),
      on_listening=lambda url: print(url, flush=True))
"""


def test_a_collection_in_service_looks_at_few_objects(
    redis_url: str, namespace: str, client: redis.Redis, until: Until
) -> None:
    publish(SnapshotStore(client, namespace), new_learner())
    with (
        scorer_process(redis_url, namespace, _COUNTING) as (_, url),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        until(lambda: http.get("/health/ready").status_code == 200)
        answers = [http.post("/v1/score", json={"user_id": 1, "items": [1]}).json() for _ in range(50)]

    assert all(answer["items"][0]["scores"]["click"] < 20_000 for answer in answers)  # without: 300,000


def test_a_port_in_use_is_named(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SmesError, match=f"scorer: cannot listen on 127.0.0.1:{port}: Address already in use"):
            serve(ScorerConfig(port=port), SCHEMA, redis_url=redis_url)


def test_redis_not_reachable_at_the_start_is_a_clear_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    message = rf"redis://:\*\*\*@127.0.0.1:{port}/0 gave no answer within 0\.3 s"

    with pytest.raises(FeatureStoreUnavailable, match=message):
        serve(ScorerConfig(port=0, redis_timeout_s=0.3), SCHEMA, redis_url=f"redis://:secret@127.0.0.1:{port}")
