"""Many swaps under load, over HTTP: no request fails, and each answer is of one version.

Requests may be scored together, which changes the last bits of their scores; versions are much further apart.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import pairwise

import httpx
import numpy as np
import pytest
import redis
from fastapi import FastAPI

from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.model.serving import ServingModel
from smes.schema import MISSING
from smes_scorer.app import create_app
from smes_scorer.config import ScorerConfig
from tests.smes_scorer.chains import MODEL, SCHEMA, Chain

SWAPS = 40
CALLERS = 3
ITEMS = list(range(0, 400, 7))
ROUNDING = 1e-6


def ids_of(user: int) -> I64:
    ids = np.full((len(ITEMS), SCHEMA.id_width), MISSING)
    ids[:, 0], ids[:, 1] = user, ITEMS
    return ids


@pytest.mark.timeout(300)
def test_requests_beside_many_swaps_are_answered_by_one_version_each(
    client: redis.Redis,
    redis_url: str,
    namespace: str,
    listening: Callable[[FastAPI], AbstractContextManager[str]],
    until: Callable[[Callable[[], object]], None],
) -> None:
    store = SnapshotStore(client, namespace)
    chain = Chain(store)
    expected: dict[int, F32] = {}  # scores of all users' requests
    numerics = np.zeros((len(ITEMS), 0), np.float32)

    def publish(kind: str) -> None:
        """As the trainer does; the expectation comes first, for a request may be faster than this thread."""
        chain.train()
        model = ServingModel.from_state(SCHEMA, MODEL, chain.learner.serving_state())
        expected[chain.learner.step_number] = np.stack([model.score(ids_of(user), numerics) for user in range(CALLERS)])
        chain.publish(kind, train=False)

    def ask(user: int, url: str) -> list[int]:
        versions: list[int] = []
        with httpx.Client(base_url=url, timeout=60) as http:
            while not done.is_set():
                answer = http.post("/v1/score", json={"user_id": user, "items": ITEMS})
                assert answer.status_code == 200, answer.text
                body = answer.json()
                scores = np.array([list(item["scores"].values()) for item in body["items"]], np.float32)
                right = expected[body["version"]][user]
                np.testing.assert_allclose(scores, right, rtol=0, atol=ROUNDING, err_msg=str(body["version"]))
                versions.append(body["version"])
        return versions

    publish("full")
    config = ScorerConfig(poll_s=0.05, entity_timeout_ms=60_000)
    done = threading.Event()
    with (
        listening(create_app(config, SCHEMA, redis_url=redis_url, namespace=namespace)) as url,
        ThreadPoolExecutor(CALLERS) as pool,
        httpx.Client(base_url=url, timeout=60) as http,
    ):

        def serves_newest() -> bool:
            return bool(http.get("/health/ready").json()["version"] == chain.version)

        until(serves_newest)
        callers = [pool.submit(ask, user, url) for user in range(CALLERS)]
        try:
            for number in range(1, SWAPS + 1):
                publish("delta")
                if number % 15 == 0:
                    chain.publish_base()
                if number % 4:  # else the scorer catches up with several at once
                    until(serves_newest)
            until(serves_newest)
        finally:
            done.set()
        versions = [caller.result() for caller in callers]
        stats = http.get("/v1/stats").json()

    in_order = [scores for _, scores in sorted(expected.items())]
    moved = [np.abs(newer - older).max(axis=(1, 2)) for older, newer in pairwise(in_order)]
    assert np.min(moved) > 20 * ROUNDING, "scores of two versions must be told apart"
    assert all(of_caller == sorted(of_caller) for of_caller in versions), "a version never goes back"
    assert len(set().union(*versions)) > SWAPS / 3
    assert stats["errors"] == 0
    assert stats["load_failures"] == 0
