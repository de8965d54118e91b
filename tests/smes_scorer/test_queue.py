"""The requests that wait to be scored: so many, so long, and none whose caller has left."""

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
import redis
from fastapi import FastAPI

from feature_store.payload import PayloadContent
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.schema import Schema
from smes_scorer.scoring_queue import ScoringQueue, one_by_one
from smes_scorer.versions import Scorable
from tests.smes_scorer.conftest import VersionModel

REQUEST = {"user_id": 1, "items": [13]}
WORKERS, MAX_WAITING = 2, 6
Until = Callable[[Callable[[], object]], None]


class Gate(VersionModel):
    """A model that scores when the test lets it; it counts what it scored."""

    def __init__(self) -> None:
        super().__init__(1)
        self.opened = threading.Event()
        self.begun = threading.Semaphore(0)
        self.scored = 0
        self._lock = threading.Lock()
        self.opened.set()  # the service scores once before a snapshot is in service

    def close(self) -> None:
        self.opened.clear()
        self.begun, self.scored = threading.Semaphore(0), 0

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        self.begun.release()
        assert self.opened.wait(60), "the test did not open the gate within 60 s"
        with self._lock:
            self.scored += 1
        return super().score(ids, numerics)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def url(
    gate: Gate,
    request: pytest.FixtureRequest,
    make_app: Callable[..., FastAPI],
    listening: Callable[[FastAPI], AbstractContextManager[str]],
    client: redis.Redis,
    namespace: str,
    publish: Callable[..., object],
    until: Until,
) -> Iterator[str]:
    """A service with the gate for a model, each request by itself.

    The parameter of a test is its ``max_age_s``, 60 s without one.
    """

    def load(payloads: Iterable[PayloadContent], schema: Schema, before: Scorable | None) -> Gate:
        return gate

    publish(SnapshotStore(client, namespace), 1)
    limits = {
        "workers": WORKERS,
        "max_together": 1,
        "max_waiting": MAX_WAITING,
        "max_age_s": getattr(request, "param", 60.0),
    }
    with listening(make_app(load=load, **limits)) as url:
        until(lambda: httpx.get(f"{url}/health/ready", timeout=60).status_code == 200)
        gate.close()
        yield url


@pytest.fixture
def callers(gate: Gate) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as callers:
        yield callers
        gate.opened.set()


def ask(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", json=REQUEST, timeout=60)


def stats(url: str) -> dict[str, Any]:
    counted: dict[str, Any] = httpx.get(f"{url}/v1/stats", timeout=60).json()
    return counted


def fill_the_workers(url: str, gate: Gate, callers: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
    """As many requests as there are workers, all being scored."""
    answers = [callers.submit(ask, url) for _ in range(WORKERS)]
    for _ in range(WORKERS):
        assert gate.begun.acquire(timeout=60)
    return answers


def test_what_fits_neither_a_worker_nor_the_queue_is_answered_503(
    url: str, gate: Gate, callers: ThreadPoolExecutor, until: Until
) -> None:
    answers = fill_the_workers(url, gate, callers)
    answers += [callers.submit(ask, url) for _ in range(MAX_WAITING)]
    until(lambda: stats(url)["waiting"] == MAX_WAITING)

    refused = ask(url)
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    gate.opened.set()

    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json() == {"detail": "busy: 6 requests wait, expected at most 6 (max_waiting)"}
    assert "smes_scorer_waiting 6.0" in metrics
    assert {answer.result().status_code for answer in answers} == {200}
    counted = stats(url)
    assert (counted["outcomes"]["ok"], counted["outcomes"]["busy"], counted["waiting"]) == (8, 1, 0)
    assert counted["latency_ms"]["count"] == 8  # refusals would make the service look fast


def send(url: str) -> socket.socket:
    """A caller that has sent its request and waits for the answer."""
    host, port = url.removeprefix("http://").split(":")
    caller = socket.create_connection((host, int(port)))
    body = b'{"user_id": 1, "items": [13]}'
    head = (
        f"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    caller.sendall(head.encode() + body)
    return caller


def test_requests_of_callers_that_left_are_not_scored(
    url: str, gate: Gate, callers: ThreadPoolExecutor, until: Until
) -> None:
    scored = fill_the_workers(url, gate, callers)
    leaving = [send(url) for _ in range(MAX_WAITING)]
    until(lambda: stats(url)["waiting"] == MAX_WAITING)

    for caller in leaving:
        caller.close()
    until(lambda: stats(url)["outcomes"]["dropped"] == MAX_WAITING)
    waiting = stats(url)["waiting"]
    lone = callers.submit(ask, url)
    gate.opened.set()

    assert waiting == 0
    assert lone.result().status_code == 200
    assert [answer.result().status_code for answer in scored] == [200] * WORKERS
    assert gate.scored == WORKERS + 1


@pytest.mark.parametrize("url", [1.0], indirect=True)
def test_a_request_that_waited_too_long_is_answered_503_and_not_scored(
    url: str, gate: Gate, callers: ThreadPoolExecutor
) -> None:
    begun = fill_the_workers(url, gate, callers)

    refused = ask(url)
    gate.opened.set()

    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json() == {"detail": "busy: waited for 1 s (max_age_s)"}
    assert [answer.result().status_code for answer in begun] == [200] * WORKERS  # what has begun is finished
    assert (gate.scored, stats(url)["outcomes"]["dropped"]) == (WORKERS, 1)


def test_health_and_metrics_do_not_wait_behind_requests(url: str, gate: Gate, callers: ThreadPoolExecutor) -> None:
    fill_the_workers(url, gate, callers)
    for _ in range(MAX_WAITING):
        callers.submit(ask, url)

    answers = [httpx.get(f"{url}{path}", timeout=60) for path in ("/health/live", "/health/ready", "/metrics")]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert gate.scored == 0


def test_validation_is_off_the_event_loop(url: str, gate: Gate, callers: ThreadPoolExecutor, until: Until) -> None:
    fill_the_workers(url, gate, callers)
    body = b'{"user_id":1,"items":[' + b",".join([b'""'] * 300_000) + b"]}"
    headers = {"content-type": "application/json"}
    wrong = callers.submit(httpx.post, f"{url}/v1/score", content=body, headers=headers, timeout=60)
    until(lambda: stats(url)["waiting"] == 1)

    alive = httpx.get(f"{url}/health/live", timeout=60)

    assert (alive.status_code, wrong.done()) == (200, False)  # it waits for a worker, and nobody waits for it
    gate.opened.set()
    assert wrong.result().status_code == 422


def test_what_cannot_be_answered_in_time_is_refused_at_once() -> None:
    async def run() -> tuple[str, list[bytes], int]:
        queue = ScoringQueue(workers=1, max_waiting=1000, max_age_s=60)
        go_on, begun = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def answer(body: bytes) -> bytes:
            if body == b"slow":
                threading.Event().wait(0.5)
            else:
                loop.call_soon_threadsafe(begun.set)
                assert go_on.wait(60)
            return body

        async def stays() -> None:
            await asyncio.Event().wait()

        def ask(body: bytes) -> "asyncio.Task[bytes]":
            return asyncio.ensure_future(queue.run(one_by_one(answer), body, stays))

        await ask(b"slow")  # so it is known how long one takes: half a second or more
        asked = [ask(b"first")]
        await begun.wait()
        while not (refused := [task for task in asked if task.done()]):
            asked.append(ask(b"next"))
            await asyncio.sleep(0)
        go_on.set()
        answers = await asyncio.gather(*(task for task in asked if task not in refused))
        queue.close()
        return str(refused[0].exception()), answers, len(refused)

    message, answers, refused = asyncio.run(run())

    assert re.fullmatch(r"\d+ requests wait, for about \d+ s, expected at most 60 s \(max_age_s\)", message), message
    assert refused == 1
    assert 1 < len(answers) <= 1 + 121  # of which one was being scored, and 60 s are enough for 120
    assert answers == [b"first", *[b"next"] * (len(answers) - 1)]
