"""Models whose scores show their version, published to a real Redis and served by a real application."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx
import numpy as np
import pytest
import redis
import uvicorn
from fastapi import FastAPI

from feature_store.config import ChunksConfig
from feature_store.entities import EntityStore
from feature_store.manifest import Manifest
from feature_store.payload import PayloadContent
from feature_store.signing import SigningConfig
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.schema import Feature, Schema, Task
from smes_io.redis_client import connect
from smes_scorer.app import create_app
from smes_scorer.config import ScorerConfig
from smes_scorer.loading import Load
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import Scorable
from tests.smes_scorer.made_payloads import version_payload

SCHEMA = Schema(
    name="scorer-test",
    tasks=(Task("click"), Task("like"), Task("watch_s", kind="regression")),
    features=(
        Feature("age", "numeric", source="user"),
        Feature("author", "id", source="item"),
        Feature("hour", "id"),
        Feature("tags", "bag", max_length=2),
        Feature("battery", "numeric"),
        Feature("seen", "sequence", max_length=3, vocabulary="item_id", query="item_id"),
        Feature("outcomes", "sequence", max_length=3, accompanies="seen"),
        Feature("days_out", "numeric", source="item", elapsed=True),
    ),
)
# ids: user_id, item_id, author, hour, tags ×2, seen ×3, outcomes ×3; numerics: age, battery, days_out


class VersionModel:
    """Scores: version + (item id mod 10) / 16; version / 2; sum of the features that are present."""

    def __init__(self, version: int) -> None:
        self._version = version

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        present = np.where(ids[:, 2:] < 0, 0, ids[:, 2:]).sum(axis=1) + np.nansum(numerics, axis=1)
        item = (ids[:, 1] % 10) / 16
        return np.stack([self._version + item, np.full(len(ids), self._version / 2), present], axis=1).astype("f4")


def _load(payloads: Iterable[PayloadContent], schema: Schema, before: Scorable | None) -> VersionModel:
    *_, last = payloads
    return VersionModel(int(last.dense["dense.version"]))


@pytest.fixture
def schema() -> Schema:
    return SCHEMA


@pytest.fixture
def load() -> Load:
    return _load


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    client = connect(redis_url, 5.0)
    yield client
    client.close()


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    return SnapshotStore(client, namespace)


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def publish() -> Callable[..., Manifest]:
    """Publishes a :class:`VersionModel` into a store."""

    def publish(
        store: SnapshotStore,
        version: int,
        *,
        lineage: str = "a",
        schema_hash: str = SCHEMA.hash,
        payload: bytes | None = None,
        arrivals: tuple[tuple[int, int], ...] = (),
        held: str | None = None,
        metrics: dict[str, object] | None = None,
    ) -> Manifest:
        metadata = {"lineage": lineage, "version": str(version), "schema_hash": schema_hash}
        return store.publish(
            version_payload(version, metadata) if payload is None else payload,
            lineage=lineage,
            version=version,
            schema_hash=schema_hash,
            step=version * 10,
            created_ms=1_700_000_000_000,
            feedback_arrivals=[(ms, count, 0, 0, 0) for ms, count in arrivals],
            held=held,
            metrics=metrics,
        )

    return publish


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Waits until a condition holds; fails after 60 s."""

    def until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        pause = threading.Event()
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true within 60 s"
            pause.wait(0.005)

    return until


@pytest.fixture
def make_app(redis_url: str, namespace: str) -> Callable[..., FastAPI]:
    """An application that loads :class:`VersionModel`; keywords go to its configuration.

    The store holds the features of an item that nobody asks for: an empty one would be a problem. However slow the
    machine is, it waits for stored features.
    """

    def make_app(
        url: str = redis_url,
        load: Load = _load,
        signing: SigningConfig | None = None,
        chunks: ChunksConfig | None = None,
        fill_store: bool = True,
        **config: object,
    ) -> FastAPI:
        if fill_store and url == redis_url:
            with connect(redis_url, 5.0) as client:
                EntityStore(client, SCHEMA, namespace).put("item", 2**62, {"author": 1})
        fast: dict[str, object] = {"poll_s": 0.05, "entity_timeout_ms": 60_000, **config}
        scorer_config = ScorerConfig(**fast)  # type: ignore[arg-type]  # tests name the fields
        return create_app(
            scorer_config, SCHEMA, redis_url=url, namespace=namespace, signing=signing, chunks=chunks, load=load
        )

    return make_app


@pytest.fixture
def listening() -> Callable[[FastAPI], AbstractContextManager[str]]:
    """Serves an application over TCP and gives its URL."""

    @contextmanager
    def listening(app: FastAPI) -> Iterator[str]:
        server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None, access_log=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "uvicorn did not start within 60 s"
            threading.Event().wait(0.005)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    return listening


@pytest.fixture
def starting(
    make_app: Callable[..., FastAPI], listening: Callable[[FastAPI], AbstractContextManager[str]]
) -> Callable[..., AbstractContextManager[httpx.Client]]:
    """A client of a served application, before it is ready."""

    @contextmanager
    def starting(**config: object) -> Iterator[httpx.Client]:
        with listening(make_app(**config)) as url, httpx.Client(base_url=url, timeout=60) as http:
            yield http

    return starting


@pytest.fixture
def ready(
    starting: Callable[..., AbstractContextManager[httpx.Client]], until: Callable[..., None]
) -> Callable[..., AbstractContextManager[httpx.Client]]:
    """A client of a served application that has loaded its first snapshot."""

    @contextmanager
    def ready(**config: object) -> Iterator[httpx.Client]:
        with starting(**config) as http:
            until(lambda: http.get("/health/ready").status_code == 200)
            yield http

    return ready
