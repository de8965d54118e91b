"""Requests that wait at the same moment are scored in one call, and answered as each would be alone."""

import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from fastapi import FastAPI

from feature_store.entities import EntityStore
from feature_store.payload import PayloadContent
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.schema import Schema
from smes_scorer.app import create_app
from smes_scorer.arms import user_point
from smes_scorer.config import ArmConfig, ScorerConfig
from smes_scorer.loading import TableModel, load_table_model
from smes_scorer.versions import Scorable
from tests.smes_scorer.made_payloads import full_payload
from tests.smes_scorer.test_explain import SCHEMA, learner

BAD_ITEM = 667
REQUESTS: list[dict[str, Any]] = [
    *({"user_id": user, "items": list(range(user, 2 * user + 1)), "context": {"hour": user}} for user in range(1, 9)),
    {"user_id": 3, "items": ["a-4", BAD_ITEM]},
    {"user_id": 3, "items": []},
    {"user_id": "u", "items": [1], "context": {"battery": "low"}},
    {"user_id": "u", "items": ["a-4"], "context": {"tags": [5], "battery": 0.5, "unknown": 1}},
    {"user_id": 4, "items": ["a-4", 3, 5, 6], "top_k": 2, "tasks": ["watch", "click"]},
]


class Held:
    """A model that scores when the test lets it, and fails for one item; it keeps how many items each call had."""

    def __init__(self, model: TableModel) -> None:
        self._model = model
        self.opened, self.begun = threading.Event(), threading.Event()
        self.opened.set()
        self.calls: list[int] = []
        self.told_apart: list[bool] = []

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        self._enter(ids)
        return self._model.score(ids, numerics, now_ms)

    def score_requests(self, ids: I64, numerics: F32, now_ms: I64, requests: I64) -> F32:
        self._enter(ids)
        users = [set(part[:, 0].tolist()) for part in np.split(ids, requests[1:])]
        self.told_apart.append(requests[0] == 0 and all(len(some) == 1 for some in users))
        return self._model.score_requests(ids, numerics, now_ms, requests)

    def _enter(self, ids: I64) -> None:
        self.begun.set()
        assert self.opened.wait(60), "the test did not open the gate within 60 s"
        self.calls.append(len(ids))
        if (ids[:, 1] == BAD_ITEM).any():
            raise RuntimeError("a bug")


def same(together: httpx.Response, alone: httpx.Response) -> None:
    """Whether two answers say the same, but for the rounding of scores."""
    assert together.status_code == alone.status_code
    one, other = together.json(), alone.json()
    if alone.status_code == 200:
        for got, expected in zip(one.pop("items"), other.pop("items"), strict=True):
            assert got.pop("scores") == pytest.approx(expected.pop("scores"), abs=1e-6)
            assert got.pop("fused") == pytest.approx(expected.pop("fused"), abs=1e-6)
            assert got == expected
    assert one == other


@pytest.mark.parametrize("share", [None, 0.5], ids=["one arm", "two arms"])
def test_requests_that_wait_are_scored_together_and_answered_as_alone(
    share: float | None,
    redis_url: str,
    namespace: str,
    client: redis.Redis,
    listening: Callable[[FastAPI], AbstractContextManager[str]],
    until: Callable[..., None],
) -> None:
    models: list[Held] = []

    def load(payloads: Iterable[PayloadContent], schema: Schema, before: Scorable | None) -> Held:
        models.append(Held(load_table_model(payloads, schema, None)))
        return models[-1]

    EntityStore(client, SCHEMA, namespace).put("user", 7, {"age": 31.0})
    EntityStore(client, SCHEMA, namespace).put("item", 3, {"author": 5, "price": 12.5})
    payload = full_payload(learner(), 1)
    arms = {} if share is None else {"b": ArmConfig(namespace=f"{namespace}-b", share=share)}
    for place in (namespace, *(arm.namespace for arm in arms.values())):
        assert place is not None
        SnapshotStore(client, place).publish(
            payload, lineage="a", version=1, schema_hash=SCHEMA.hash, step=1, created_ms=1_700_000_000_000
        )
    config = ScorerConfig(poll_s=0.05, entity_timeout_ms=60_000, workers=1, arms=arms, split_salt="x")
    app = create_app(config, SCHEMA, redis_url=redis_url, namespace=namespace, load=load)
    with (
        listening(app) as url,
        httpx.Client(base_url=url, timeout=60) as http,
        ThreadPoolExecutor(20) as callers,
    ):
        post: Callable[[dict[str, Any]], httpx.Response] = partial(_post, url)
        until(lambda: http.get("/health/ready").status_code == 200 and len(models) == 1 + len(arms))
        until(lambda: all(arm["ready"] for arm in http.get("/v1/stats").json().get("arms", {}).values()))
        alone = [post(request) for request in REQUESTS]
        for model in models:
            model.opened.clear()
            model.begun.clear()
            model.calls.clear()
        first = callers.submit(post, REQUESTS[0])
        until(lambda: any(model.begun.is_set() for model in models))
        waiting = [callers.submit(post, request) for request in REQUESTS]
        until(lambda: http.get("/v1/stats").json()["waiting"] == len(REQUESTS))
        for model in models:
            model.opened.set()
        together = [answer.result() for answer in waiting]
        calls = [count for model in models for count in model.calls]
        good = httpx.post(f"{url}/v1/score", json=REQUESTS[1], timeout=60)

    assert [answer.status_code for answer in alone] == [200] * 8 + [500, 422, 422, 200, 200]
    for got, expected in zip([first.result(), *together], [alone[0], *alone], strict=True):
        same(got, expected)
    assert good.status_code == 200
    told_apart = [one for model in models for one in model.told_apart]
    assert told_apart or share is None, "one item makes each call for several requests fail, where there is one arm"
    assert all(told_apart)
    if share is not None:
        of_b = [user for user in range(1, 9) if user_point(user, b"x") < share]
        assert [answer.json()["arm"] == "b" for answer in together[:8]] == [user in of_b for user in range(1, 9)]
        assert 0 < len(of_b) < 8
    # Each model is called for all at once, and after that for each, since one item makes that call fail.
    of_all = sum(len(request["items"]) for request in REQUESTS) - 1
    assert max(calls) >= (of_all if share is None else of_all // 4)


def _post(url: str, request: dict[str, Any]) -> httpx.Response:
    content, headers = json.dumps(request).encode(), {"content-type": "application/json"}
    return httpx.post(f"{url}/v1/score", content=content, headers=headers, timeout=60)
