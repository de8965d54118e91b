"""A running scorer takes a changed schema over with the version that brings it; learned weights, real Redis, HTTP."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import torch
from fastapi import FastAPI

from feature_store.entities import EntityStore
from feature_store.snapshots import SnapshotStore
from smes.events import ExampleBlock
from smes.model.carry_over import carry_over
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.schema import Feature, Schema, Task
from smes.schema_change import Renames, SchemaChange
from smes_scorer.app import create_app
from smes_scorer.config import ArmConfig, ScorerConfig
from tests.smes_scorer.made_payloads import delta_payload, full_payload, marks_of

Until = Callable[[Callable[[], object]], None]
Listening = Callable[[FastAPI], AbstractContextManager[str]]

WAS = Schema(
    "was",
    tasks=(Task("click"), Task("like")),
    features=(Feature("writer", source="item"), Feature("hour"), Feature("price", "numeric", source="item")),
)
NOW = Schema(
    "now",
    tasks=(Task("share"), Task("like"), Task("click")),
    features=(
        Feature("device"),
        Feature("author", source="item", vocabulary="writer"),
        Feature("hour"),
        Feature("price", "numeric", source="item"),
        Feature("battery", "numeric"),
    ),
)
RENAMED = {"author": "writer"}
STRANGE = Schema("strange", tasks=(Task("click"),))
MODEL = ModelConfig(ranker="shared_bottom", embedding_dim=4, head_dim=4)
REQUEST = {"user_id": 3, "items": list(range(20)), "context": {"hour": 5, "device": 2, "battery": 0.5}}


def train(learner: Learner, seed: int, steps: int = 5) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        examples = ExampleBlock.empty(learner.schema, 64)
        examples.ids[:] = rng.integers(0, 30, examples.ids.shape)
        examples.numerics[:] = rng.normal(size=examples.numerics.shape)
        examples.labels[:] = rng.random(examples.labels.shape) < 0.3
        learner.step(learner.prepare(examples))


def new_learner(schema: Schema) -> Learner:
    return Learner(schema, MODEL, OptimizerConfig(), device=torch.device("cpu"))


def learned() -> Learner:
    learner = new_learner(WAS)
    train(learner, 0)
    return learner


def changed(learner: Learner) -> Learner:
    """The same under the new schema."""
    change = SchemaChange(WAS, NOW, Renames(features=RENAMED))
    other = new_learner(NOW)
    other.load_state(carry_over(learner.state(), change, MODEL, OptimizerConfig(), 0))
    return other


def publish(store: SnapshotStore, learner: Learner, version: int, **more: Any) -> None:
    marks = marks_of(learner, version) | ({"renamed": json.dumps(RENAMED)} if learner.schema is NOW else {})
    learner.skip_delta()
    store.publish(
        full_payload(learner, version, marks=marks),
        lineage="a",
        version=version,
        schema_hash=learner.schema.hash,
        step=version,
        created_ms=1,
        **more,
    )


def publish_delta(store: SnapshotStore, learner: Learner) -> None:
    """What was learned since version 2, as version 3."""
    delta = learner.take_delta()
    assert len(delta) > 0
    store.publish(
        delta_payload(learner, 3, delta),
        lineage="a",
        version=3,
        schema_hash=NOW.hash,
        step=3,
        created_ms=1,
        applies_to={2},
        carried_from=[WAS.hash],
    )


def ask(http: httpx.Client) -> dict[str, Any]:
    response = http.post("/v1/score", json=REQUEST)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def tasks_of(answer: dict[str, Any]) -> list[str]:
    return list(answer["items"][0]["scores"])


def health(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/health/ready").json()
    return found


def refused(http: httpx.Client, version: int) -> bool:
    return f"a:{version}" in str(health(http)["problems"]["snapshots"])


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    """Beside features that were written under the old schema."""
    entities, items = EntityStore(client, WAS, namespace), np.arange(20)
    entities.put_many("item", items, {"writer": items % 7, "price": np.ones(20)})
    return SnapshotStore(client, namespace)


@pytest.fixture
def served(
    redis_url: str, namespace: str, listening: Listening, until: Until
) -> Callable[..., AbstractContextManager[httpx.Client]]:
    """A client of a scorer that was started with the old schema, and has a version in service."""

    @contextmanager
    def served(**config: Any) -> Iterator[httpx.Client]:
        config = {"poll_s": 0.05, "entity_timeout_ms": 60_000, **config}
        app = create_app(ScorerConfig(**config), WAS, redis_url=redis_url, namespace=namespace)
        with listening(app) as url, httpx.Client(base_url=url, timeout=60) as http:
            until(lambda: http.get("/health/ready").status_code == 200)
            yield http

    return served


Served = Callable[..., AbstractContextManager[httpx.Client]]


def test_the_schema_changes_under_load_without_a_restart(
    store: SnapshotStore, served: Served, client: redis.Redis, namespace: str, until: Until
) -> None:
    was = learned()
    now = changed(was)
    publish(store, was, 1)
    with served(fusion_weights={"click": 3.0}) as http:
        before = ask(http)
        answers: list[dict[str, Any]] = []
        stop = threading.Event()

        def keep_asking() -> None:
            while not stop.is_set():
                answers.append(ask(http))

        askers = [threading.Thread(target=keep_asking) for _ in range(3)]
        for asker in askers:
            asker.start()
        publish(store, now, 2, carried_from=[WAS.hash])
        until(lambda: answers and answers[-1]["version"] == 2)
        stop.set()
        for asker in askers:
            asker.join()
        after = ask(http)

        assert tasks_of(before) == ["click", "like"]
        assert tasks_of(after) == ["share", "like", "click"]
        expected = {1: {"click", "like"}, 2: {"click", "like", "share"}}
        assert all(set(tasks_of(answer)) == expected[answer["version"]] for answer in answers)
        for old, new in zip(before["items"], after["items"], strict=True):  # bit for bit
            scores = dict(new["scores"])
            share = scores.pop("share")
            assert scores == old["scores"]
            assert new["fused"] == pytest.approx(3 * scores["click"] + scores["like"] + share, rel=1e-6)
        assert before["features_missing"] == {"user": [], "context": [], "items": {}}
        assert after["features_missing"] == before["features_missing"]  # the author was stored as the writer
        assert health(http)["status"] == "ready"
        described = http.get("/openapi.json").json()["components"]["schemas"]
        assert list(described["Scores"]["properties"]) == ["share", "like", "click"]
        assert http.get("/v1/stats").json()["ignored_context"] > 0  # device and battery, before

        train(now, 1)
        publish_delta(store, now)
        until(lambda: ask(http)["version"] == 3)
        assert http.get("/metrics").text.count("smes_scorer_full_loads_total 2.0") == 1

        store.operator.rollback(1, lineage="a", why="a test", by="test")
        until(lambda: ask(http)["version"] == 1)
        assert ask(http)["items"] == before["items"]


def test_a_scorer_that_starts_with_the_old_schema_file_takes_the_change_over(
    store: SnapshotStore, served: Served
) -> None:
    now = changed(learned())
    publish(store, now, 2, carried_from=[WAS.hash])
    train(now, 1)
    publish_delta(store, now)
    with served() as http:
        answer = ask(http)

    assert (answer["version"], tasks_of(answer)) == (3, ["share", "like", "click"])


def test_any_other_schema_is_refused_by_name(store: SnapshotStore, served: Served, until: Until) -> None:
    was = learned()
    publish(store, was, 1)
    with served() as http:
        for version, (learner, more) in enumerate(
            [
                (changed(was), {}),
                (changed(was), {"carried_from": [STRANGE.hash]}),
                (new_learner(STRANGE), {"carried_from": [NOW.hash]}),
            ],
            2,
        ):
            publish(store, learner, version, **more)
            until(partial(refused, http, version))
            problem = health(http)["problems"]["snapshots"]
            assert WAS.hash in problem
            assert learner.schema.hash in problem
        # The manifest says one schema, and the payload has another.
        store.publish(
            full_payload(was, 9),
            lineage="a",
            version=9,
            schema_hash=NOW.hash,
            step=9,
            created_ms=1,
            carried_from=[WAS.hash],
        )
        until(partial(refused, http, 9))
        assert health(http)["problems"]["snapshots"] == (
            f"snapshot a:9: schema {WAS.hash} in its payload, expected {NOW.hash}"
        )
        assert tasks_of(ask(http)) == ["click", "like"]


def test_arms_may_be_ahead_of_the_main_arm(
    store: SnapshotStore, served: Served, client: redis.Redis, namespace: str, until: Until
) -> None:
    was = learned()
    publish(store, was, 1)
    publish(SnapshotStore(client, f"{namespace}-b"), changed(was), 2, carried_from=[WAS.hash])
    publish(SnapshotStore(client, f"{namespace}-c"), changed(was), 3, carried_from=[WAS.hash])
    arms = {
        "b": ArmConfig(namespace=f"{namespace}-b", share=0.5),
        "c": ArmConfig(namespace=f"{namespace}-c", shadow=True),
    }
    with served(arms=arms, fusion_weights={"like": 2.0}) as http:
        until(lambda: all(arm["ready"] for arm in health(http)["arms"].values()))
        answers = [http.post("/v1/score", json={**REQUEST, "user_id": user}).json() for user in range(20)]
        by_main = sum(answer["arm"] == "main" for answer in answers)

        assert {(answer["arm"], *tasks_of(answer)) for answer in answers} == {
            ("main", "click", "like"),
            ("b", "share", "like", "click"),
        }
        scored = f'smes_scorer_arm_shadow_requests_total{{arm="c",outcome="scored"}} {by_main}.0'
        until(lambda: scored in http.get("/metrics").text)
        shown = http.get("/metrics").text
        # Its old tasks score the same, and the new one has nothing to be compared with.
        same = f'smes_scorer_arm_score_difference_bucket{{arm="c",le="0.0001",task="click"}} {20 * by_main}.0'
        assert same in shown
        assert 'arm="c",task="share"' not in shown


def test_a_shadow_without_a_task_that_was_asked_for_is_measured_all_the_same(
    store: SnapshotStore, served: Served, client: redis.Redis, namespace: str, until: Until
) -> None:
    publish(store, learned(), 1)
    gone = new_learner(Schema("gone", tasks=(Task("click"),), features=WAS.features))
    publish(SnapshotStore(client, f"{namespace}-c"), gone, 2, carried_from=[WAS.hash])
    with served(arms={"c": ArmConfig(namespace=f"{namespace}-c", shadow=True)}) as http:
        until(lambda: health(http)["arms"]["c"]["ready"])
        context = {"hour": 5, "unknown": float("nan")}  # which only the standard library reads
        for more in ({}, {"context": context}):
            asked = json.dumps({**REQUEST, "tasks": ["like"], **more}).encode()
            answer = http.post("/v1/score", content=asked, headers={"content-type": "application/json"})
            assert tasks_of(answer.json()) == ["like"]

        scored = 'smes_scorer_arm_shadow_requests_total{arm="c",outcome="scored"} 2.0'
        until(lambda: scored in http.get("/metrics").text)


def test_weights_of_a_task_that_is_gone_are_a_problem(store: SnapshotStore, served: Served, until: Until) -> None:
    was = learned()
    publish(store, was, 1)
    gone = Schema("gone", tasks=(Task("click"),), features=WAS.features)
    learner = new_learner(gone)
    with served(fusion_weights={"like": 2.0}) as http:
        publish(store, learner, 2, carried_from=[WAS.hash])
        until(lambda: ask(http)["version"] == 2)

        assert health(http)["problems"]["configuration"] == (
            "scorer.fusion_weights: like: no task of the version in service"
        )
        assert health(http)["status"] == "degraded"
