"""A scorer with tokens says nothing of itself without one; a scorer without any is open."""

import asyncio
import hmac
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from fastapi import FastAPI

from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes_io.bearer import Tokens
from smes_io.secrets import SecretError, SecretPlace
from smes_scorer.scoring_queue import ScoringQueue, one_by_one

ONE, TWO, THREE = "0123456789abcdef", "fedcba9876543210-._~+/==", "another-token-for-rotation"
EVERYTHING = ["/v1/stats", "/metrics", "/docs", "/docs/start.js", "/openapi.json", "/", "/v1/score", "/no/such/path"]
Ready = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# of the shop\n{ONE}\n\n# of the other shop\n{TWO}\n")
    return path


@pytest.fixture
def ready(ready: Ready, client: redis.Redis, namespace: str, publish: Callable[..., object]) -> Ready:
    """A client of a served application that has loaded its first snapshot, which is published here."""
    publish(SnapshotStore(client, namespace), 1)
    return ready


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


WRONG: list[dict[str, str] | list[tuple[str, str]]] = [
    {},
    bearer(THREE),
    bearer(ONE[:-1]),
    bearer(ONE + "0"),
    bearer(ONE.upper()),
    {"authorization": "Bearer"},
    {"authorization": ONE},
    {"authorization": f"Basic {ONE}"},
    {"authorization": f"Bearer{ONE}"},
    bearer("# of the shop"),
    [("authorization", f"Bearer {ONE}"), ("authorization", f"Bearer {THREE}")],
]


@pytest.mark.parametrize("path", EVERYTHING)
def test_without_a_token_every_path_and_method_has_the_same_answer(ready: Ready, file: Path, path: str) -> None:
    with ready(tokens=SecretPlace(file=file)) as http:
        answers = [http.request(method, path) for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS")]
        answers += [http.get(path, headers=headers) for headers in WRONG]

    assert {answer.status_code for answer in answers} == {401}
    assert {answer.content for answer in answers} == {b'{"detail":"a bearer token is needed"}'}
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}


@pytest.mark.parametrize("token", [ONE, TWO])
def test_with_any_of_the_tokens_everything_is_as_without_tokens(ready: Ready, file: Path, token: str) -> None:
    with ready(tokens=SecretPlace(file=file)) as http:
        http.headers.update(bearer(token))
        score = http.post("/v1/score", json={"user_id": 1, "items": [13]})
        statuses = {path: http.get(path).status_code for path in EVERYTHING}
        details = http.get("/health/ready").json()

    assert score.status_code == 200
    assert statuses == dict.fromkeys(EVERYTHING, 200) | {"/": 404, "/no/such/path": 404, "/v1/score": 405}
    assert details["version"] == 1
    assert "problems" in details


def test_health_is_open_and_says_no_more_than_a_word(ready: Ready, file: Path) -> None:
    with ready(tokens=SecretPlace(file=file)) as http:
        assert http.get("/health/live").json() == {"status": "alive"}
        assert http.get("/health/ready").json() == {"status": "ready"}
        assert http.get("/health/ready", headers=bearer(THREE)).json() == {"status": "ready"}
        assert http.post("/health/live").status_code == 401


def test_health_of_a_scorer_that_is_not_ready(
    starting: Callable[..., AbstractContextManager[httpx.Client]], file: Path
) -> None:
    with starting(tokens=SecretPlace(file=file)) as http:
        answer = http.get("/health/ready")

    assert (answer.status_code, answer.json()) == (503, {"status": "not ready"})


def test_a_body_without_a_token_is_not_read(ready: Ready, file: Path) -> None:
    with ready(tokens=SecretPlace(file=file), max_body_bytes=1000) as http:
        large = http.post("/v1/score", content=b"x" * 500_000)
        outcomes = http.get("/v1/stats", headers=bearer(ONE)).json()["outcomes"]

    assert (large.status_code, large.headers["connection"]) == (401, "close")
    assert outcomes["rejected"] == 1


def test_without_tokens_everybody_may_ask(ready: Ready) -> None:
    with ready() as http:
        assert http.get("/metrics").status_code == 200
        assert http.get("/openapi.json", headers=bearer("whatever")).status_code == 200
        assert http.get("/health/ready").json()["version"] == 1


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_file_that_changes_is_read_again(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    clock = Clock()
    tokens = Tokens(SecretPlace(file=file), clock)

    def accepted() -> list[bool]:
        return [tokens.accept(f"Bearer {token}".encode()) for token in (ONE, TWO, THREE)]

    assert accepted() == [True, True, False]
    file.write_text(f"{TWO}\n{THREE}\n")
    assert accepted() == [True, True, False]  # it looks once a second
    clock.now_s += 1.0
    assert accepted() == [False, True, True]

    file.write_text("short\n")
    clock.now_s += 1.0
    assert accepted() == [False, True, True]
    file.unlink()
    clock.now_s += 1.0
    assert accepted() == [False, True, True]
    assert f"scorer.tokens: read 2 from file {file}, which has changed" in caplog.text
    assert "the tokens stay as they were: scorer.tokens: " in caplog.text
    assert not any(token in caplog.text for token in (ONE, TWO, THREE, "short"))

    file.write_text(f"{ONE}\n")
    clock.now_s += 1.0
    assert accepted() == [True, False, False]


def test_tokens_may_stand_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKENS", f"{ONE}\n{TWO}")
    tokens = Tokens(SecretPlace(env="SCORER_TOKENS"))

    assert [tokens.accept(f"bearer {token}".encode()) for token in (ONE, TWO, THREE)] == [True, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("too-short\n", r"scorer\.tokens: file .*: line 1 is no token, expected 16 or more of letters, digits and -"),
        (f"{ONE}\nwith blanks and umläuts\n", r"scorer\.tokens: file .*: line 2 is no token"),
        ("# nothing\n\n", r"scorer\.tokens: file .*: no token, expected one a line"),
        ("", r"scorer\.tokens: file .*: empty, expected a secret"),
    ],
)
def test_a_wrong_file_ends_the_start_and_is_not_quoted(
    make_app: Callable[..., FastAPI], file: Path, content: str, message: str
) -> None:
    file.write_text(content)

    with pytest.raises(SecretError, match=message) as error:
        make_app(tokens=SecretPlace(file=file))
    assert not any(word in str(error.value) for word in ("short", "umläuts", ONE))


def test_every_token_is_compared_by_its_hash(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number of comparisons nor their length depends on what was shown or on which token fits."""
    compared: list[tuple[int, int]] = []
    digest = hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return digest(a, b)

    monkeypatch.setattr("smes_io.bearer.hmac.compare_digest", noted)
    tokens = Tokens(SecretPlace(file=file))
    for shown in (b"", f"Bearer {ONE}".encode(), f"Bearer {TWO}".encode(), b"Bearer " + os.urandom(4000), b"Basic x"):
        compared.clear()
        tokens.accept(shown)
        assert compared == [(32, 32), (32, 32)]


class Slow:
    """A model that takes until it is told to go on; while it is warmed up, it takes no time."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        self.go_on.wait(60)
        return np.zeros((len(ids), 3), np.float32)


def test_an_answer_that_takes_too_long_is_503_and_the_next_one_is_scored(
    starting: Callable[..., AbstractContextManager[httpx.Client]],
    client: redis.Redis,
    namespace: str,
    publish: Callable[..., object],
    until: Callable[[Callable[[], object]], None],
) -> None:
    publish(SnapshotStore(client, namespace), 1)
    model = Slow()
    with starting(load=lambda *arguments: model, request_timeout_s=0.5, workers=1) as http:
        until(lambda: http.get("/health/ready").status_code == 200)
        model.go_on.clear()
        late = http.post("/v1/score", json={"user_id": 1, "items": [13]})
        waiting = http.post("/v1/score", json={"user_id": 1, "items": [13]})  # for the worker, which still scores
        model.go_on.set()
        fine = http.post("/v1/score", json={"user_id": 1, "items": [13]})
        outcomes = http.get("/v1/stats").json()["outcomes"]

    assert (late.status_code, waiting.status_code, fine.status_code) == (503, 503, 200)
    assert late.json() == {"detail": "no answer within 0.5 s (request_timeout_s)"}
    assert (late.headers["retry-after"], late.headers["connection"]) == ("1", "close")
    assert (outcomes["dropped"], outcomes["ok"]) == (2, 1)


def test_a_job_that_nobody_waits_for_any_more_is_not_done() -> None:
    async def run() -> tuple[list[str], int]:
        queue = ScoringQueue(workers=1, max_waiting=10, max_age_s=60)
        done: list[str] = []
        go_on = threading.Event()

        def answer(name: bytes) -> bytes:
            go_on.wait(60)
            done.append(name.decode())
            return b""

        work = one_by_one(answer)

        async def stays() -> None:
            await asyncio.Event().wait()

        def ask(name: str) -> "asyncio.Task[Any]":
            return asyncio.ensure_future(queue.run(work, name.encode(), stays))

        first, second = ask("first"), ask("second")
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        third = ask("third")
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait([first, third])
        queue.close()
        return done, queue.depth

    assert asyncio.run(run()) == (["first", "third"], 0)
