"""What an answer is made of, asked of a served application with a real model; and the page that shows the interface."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
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
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.rankers.sparse.config import ExpertsConfig, SmesConfig
from smes.schema import MISSING, Derived, Feature, Schema, Task
from smes_io.clock import wall_clock_ms
from smes_scorer.app import create_app
from smes_scorer.config import ScorerConfig
from smes_scorer.loading import load_table_model
from tests.smes_scorer.made_payloads import full_payload

SCHEMA = Schema(
    "explained",
    tasks=(Task("click"), Task("like"), Task("watch", kind="regression")),
    features=(
        Feature("age", "numeric", source="user"),
        Feature("author", "id", source="item"),
        Feature("price", "numeric", source="item"),
        Feature("hour", "id"),
        Feature("tags", "bag", max_length=3),
        Feature("battery", "numeric"),
    ),
    derived=(
        Derived("author at hour", "cross", of=("author", "hour")),
        Derived("price level", "bucket", of=("price",), boundaries=(10.0, 20.0)),
        Derived("day", "day_of_week"),
        Derived("ages", "bucket", of=("age",), boundaries=(18.0,)),
    ),
)
SMES = SmesConfig(num_group=3, encoder_dims=(8,), trunk_dims=(8,), experts=ExpertsConfig(num=12, dims=(8,)))
REQUEST = {"user_id": 7, "items": [3, "a-4", 5], "context": {"hour": 20, "tags": [1, 2]}}


def learner(ranker: str = "smes") -> Learner:
    """A learner that has seen the ids of the request."""
    model = ModelConfig(ranker=ranker, smes=SMES, embedding_dim=4, head_dim=4)  # type: ignore[arg-type]
    made = Learner(SCHEMA, model, OptimizerConfig(), device=torch.device("cpu"), seed=1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        block = ExampleBlock.empty(SCHEMA, 64)
        ids = rng.integers(0, 30, block.ids.shape)
        labels = (rng.random(block.labels.shape) < 0.4).astype("f4")
        numerics = rng.uniform(0, 40, block.numerics.shape).astype("f4")
        time_ms = np.full(64, 1_700_000_000_000)
        made.step(made.prepare(replace(block, ids=ids, numerics=numerics, labels=labels, event_time_ms=time_ms)))
    return made


@pytest.fixture
def serving(
    redis_url: str,
    namespace: str,
    client: redis.Redis,
    store: SnapshotStore,
    listening: Callable[[FastAPI], AbstractContextManager[str]],
    until: Callable[..., None],
) -> Iterator[Callable[..., httpx.Client]]:
    """A client of an application that serves a learner's weights."""
    stops: list[Any] = []

    def serving(made: Learner, **config: Any) -> httpx.Client:
        EntityStore(client, SCHEMA, namespace).put("user", 7, {"age": 31.0})
        EntityStore(client, SCHEMA, namespace).put("item", 3, {"author": 5, "price": 12.5})
        store.publish(
            full_payload(made, 1), lineage="a", version=1, schema_hash=SCHEMA.hash, step=1, created_ms=1_700_000_000_000
        )
        settings = ScorerConfig(poll_s=0.05, entity_timeout_ms=60_000, **config)
        app = create_app(settings, SCHEMA, redis_url=redis_url, namespace=namespace, load=load_table_model)
        stops.append(server := listening(app))
        http = httpx.Client(base_url=server.__enter__(), timeout=60)
        stops.append(http)
        until(lambda: http.get("/health/ready").status_code == 200)
        return http

    yield serving
    for stop in reversed(stops):
        stop.__exit__(None, None, None)


def test_scores_of_an_explanation_are_those_of_an_answer_and_its_experts_those_of_the_model(
    serving: Callable[..., httpx.Client],
) -> None:
    made = learner()
    http = serving(made)

    answer, explained = (http.post(path, json=REQUEST).json() for path in ("/v1/score", "/v1/explain"))

    experts = [item.pop("experts") for item in explained["items"]]
    features = [item.pop("features") for item in explained["items"]]
    of_all = explained.pop("features")
    assert explained == answer  # scores to the last bit: JSON has all of them

    ids = np.full((3, SCHEMA.id_width), MISSING, np.int64)
    item_ids = [item["item_id"]["value"] for item in features]
    ids[:, 0], ids[:, 1], ids[:, SCHEMA.id_slices["hour"]] = 7, item_ids, 20
    ids[:, SCHEMA.id_slices["tags"]] = [1, 2, MISSING]
    ids[0, SCHEMA.id_slices["author"]] = 5
    numerics = np.full((3, 3), np.nan, np.float32)
    numerics[:, 0], numerics[0, 1] = 31, 12.5
    model = ServingModel.from_state(SCHEMA, made.config, made.serving_state())
    expected = model.explain(ids, numerics, wall_clock_ms()).experts_NTE
    assert expected is not None
    for n, of_tasks in enumerate(experts):
        assert list(of_tasks) == ["click", "like", "watch"]
        for t, found in enumerate(of_tasks.values()):
            assert {e: weight for e, weight in found} == {  # noqa: C416 - pairs of JSON are lists
                e: pytest.approx(w, rel=1e-5) for e, w in enumerate(expected[n, t].tolist()) if w > 0
            }
            assert [weight for _, weight in found] == sorted((weight for _, weight in found), reverse=True)
            assert len(found) == 3  # num_group

    assert of_all["user"] == {
        "user_id": {"value": 7, "source": "request"},
        "age": {"value": 31.0, "source": "store"},
        "ages": {"value": 1, "source": "derived"},
    }
    day = of_all["context"].pop("day")
    assert (0 <= day["value"] <= 6, day["source"]) == (True, "derived")
    assert of_all["context"] == {
        "hour": {"value": 20, "source": "request"},
        "tags": {"value": [1, 2], "source": "request"},
        "battery": {"value": None, "source": "missing"},
    }
    assert features[0]["price level"] == {"value": 1, "source": "derived"}
    assert features[0]["author at hour"]["source"] == "derived"
    assert features[0]["author"] == {"value": 5, "source": "store"}
    assert features[2] == {
        "item_id": {"value": 5, "source": "request"},
        **{n: {"value": None, "source": "missing"} for n in ("author", "price", "author at hour", "price level")},
    }


def test_explanations_count_nowhere_and_are_refused_as_requests_are(serving: Callable[..., httpx.Client]) -> None:
    http = serving(learner("shared_bottom"))

    without_experts = http.post("/v1/explain", json=REQUEST)
    many, unknown = (http.post("/v1/explain", json={**REQUEST, "items": list(range(n))}) for n in (51, 0))
    no_json = http.post("/v1/explain", content=b"{", headers={"content-type": "application/json"})

    assert without_experts.status_code == 200
    assert [item["experts"] for item in without_experts.json()["items"]] == [None] * 3
    assert (many.status_code, unknown.status_code, no_json.status_code) == (422, 422, 422)
    assert many.json()["detail"][0]["msg"] == "51 items, expected at most 50 to explain"
    stats = http.get("/v1/stats").json()
    assert (stats["requests"], stats["versions_answered"]) == (0, 0)


def test_the_page_of_the_interface_loads_nothing_from_another_host(
    make_app: Callable[..., FastAPI], listening: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    with listening(make_app()) as url, httpx.Client(base_url=url) as http:
        page = http.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        loaded = re.findall(r'(?:href|src)="([^"]*)"', page.text)
        assert len([path for path in loaded if path.startswith("docs/")]) == 3
        for path in loaded:
            assert path == "data:," or http.get(f"/{path}").status_code == 200
        start = http.get("/docs/start.js").text
        assert "://" not in page.text + start
        assert json.loads(http.get("/openapi.json").text)["paths"].keys() >= {"/v1/score", "/v1/explain"}
    vendor = Path(str(files("smes_scorer"))) / "docs_page/vendor/swagger-ui"
    assert "Apache License" in (vendor / "LICENSE").read_text()
    assert (vendor / "VERSION").read_text().startswith("swagger-ui-dist 5.")
