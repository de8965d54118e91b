"""The scorer as a process, and clients that are slow, silent, many or hostile: nobody waits for them.

Raw sockets on the loopback interface stand for the clients; processor time is that of the service's process.
"""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from feature_store.snapshots import SnapshotStore
from smes_scorer.config import ScorerConfig
from smes_scorer.connections import bounded_protocol
from tests.smes_scorer.conftest import SCHEMA

HANG_S = 40.0  # longer than any load makes these waits
Until = Callable[[Callable[[], object]], None]
_ROOT = Path(__file__).parents[2]

_SERVE = """
import json, sys, threading
import numpy as np
from smes.schema import Schema
from smes_scorer.config import ScorerConfig
from smes_scorer.service import serve

class Model:  # takes a while for each request, without the processor
    def score(self, ids, numerics, now_ms):
        threading.Event().wait(float(sys.argv[4]))
        return np.zeros((len(ids), 3), np.float32)

serve(ScorerConfig(port=0, poll_s=0.05, **json.loads(sys.argv[5])), Schema.from_dict(json.loads(sys.argv[1])),
      redis_url=sys.argv[2], namespace=sys.argv[3], load=lambda payloads, schema, before: Model(),
      on_listening=lambda url: print(url, flush=True))
"""


@dataclass(frozen=True)
class Service:
    """A scorer in a process of its own."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def stats(self) -> dict[str, Any]:
        counted: dict[str, Any] = httpx.get(f"{self.url}/v1/stats", timeout=60).json()
        return counted

    def connections(self) -> int:
        """Open connections, without those that listen."""
        return sum(c.status == psutil.CONN_ESTABLISHED for c in self.of_process.net_connections("tcp") if self._own(c))

    def cut(self, reason: str) -> int:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        name = f'smes_scorer_connections_cut_total{{reason="{reason}"}}'
        return int(float(next(line for line in lines if line.startswith(name)).split()[1]))

    def cpu_s(self) -> float:
        used = self.of_process.cpu_times()
        return float(used.user + used.system)

    @property
    def of_process(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def _own(self, connection: Any) -> bool:
        return bool(connection.laddr.port == self.address[1])


@pytest.fixture
def serving(
    redis_url: str,
    namespace: str,
    client: redis.Redis,
    publish: Callable[..., object],
    until: Until,
    tmp_path: Path,
) -> Iterator[Callable[..., Service]]:
    """Starts a service that is ready: ``serving(score_s=0.0, **config)``."""
    publish(SnapshotStore(client, namespace), 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:

        def serving(score_s: float = 0.0, **config: object) -> Service:
            log = tmp_path / "log"
            values = [json.dumps(SCHEMA.to_dict()), redis_url, namespace, str(score_s), json.dumps(config)]
            command = [sys.executable, "-P", "-c", _SERVE, *values]
            errors = stack.enter_context(log.open("wb"))
            process = stack.enter_context(
                subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=errors, env=environment)
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            service = Service(process, process.stdout.readline().decode().strip(), log)
            until(lambda: httpx.get(f"{service.url}/health/ready", timeout=60).status_code == 200)
            return service

        yield serving


@contextmanager
def clients(service: Service, number: int, first: bytes) -> Iterator[list[socket.socket]]:
    """So many connections, each of which has sent something."""
    with ExitStack() as stack:
        opened = []
        for _ in range(number):
            opened.append(stack.enter_context(socket.create_connection(service.address, timeout=60)))
            opened[-1].sendall(first)
        yield opened


def head(length: int, path: str = "/v1/score") -> bytes:
    """The headers of a request with a body of this length."""
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def posted(body: bytes) -> bytes:
    return head(len(body)) + body


def answered(clients: list[socket.socket]) -> list[socket.socket]:
    """Those that have got something."""
    return select.select(clients, [], [], 0)[0]


def everything(client: socket.socket) -> bytes:
    """What a client gets until the other side closes."""
    received = b""
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def score(service: Service) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/score", json={"user_id": 1, "items": [13]}, timeout=60)


REQUEST = posted(b'{"user_id": 1, "items": [13]}')


def test_500_callers_that_leave_cost_the_next_one_nothing(serving: Callable[..., Service], until: Until) -> None:
    service = serving(score_s=1.0, max_connections=600)
    with clients(service, 500, REQUEST):
        until(lambda: service.stats()["outcomes"]["busy"] >= 250)  # of 500, two are scored and 200 wait
    until(lambda: service.stats()["waiting"] == 0)

    begun_s = time.monotonic()
    answer = score(service)
    waited_s = time.monotonic() - begun_s

    until(lambda: sum(service.stats()["outcomes"].values()) == 501)  # also those that were scored for nobody
    outcomes = service.stats()["outcomes"]
    assert answer.status_code == 200
    assert waited_s < HANG_S  # those 500 would take four minutes
    assert outcomes["busy"] + outcomes["dropped"] >= 350


WRONG = {
    "empty strings": b'{"user_id":1,"items":[' + b",".join([b'""'] * 300_000) + b"]}",
    "lists of lists": b'{"user_id":1,"items":[' + b",".join([b"[[]]"] * 180_000) + b"]}",
    "unknown fields": b"{" + b",".join(b'"%06x":1' % i for i in range(90_000)) + b"}",
    "too many": b'{"user_id":1,"items":[' + b",".join([b"1"] * 450_000) + b"]}",
    "not closed": b'{"user_id":1,"items":[' + b",".join([b"1"] * 450_000),
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG.keys())
def test_a_large_wrong_body_costs_little(serving: Callable[..., Service], body: bytes) -> None:
    service, headers = serving(), {"content-type": "application/json"}
    with httpx.Client(timeout=60) as http:
        post = [http.post(f"{service.url}/v1/score", content=body, headers=headers) for _ in range(3)]  # warm
        before_s = service.cpu_s()
        post += [http.post(f"{service.url}/v1/score", content=body, headers=headers) for _ in range(20)]
        each_s = (service.cpu_s() - before_s) / 20

    assert {answer.status_code for answer in post} == {422}
    assert 1 <= len(post[0].json()["detail"]) <= 10
    assert len(post[0].content) < 1000
    assert each_s < 0.05
    assert score(service).status_code == 200


def test_300_clients_that_never_finish_their_bodies_are_sent_away(
    serving: Callable[..., Service], until: Until
) -> None:
    service = serving(body_timeout_s=2.0)
    with clients(service, 300, head(900_000) + b"x" * 850_000) as slow:
        lone = score(service)
        answers = [everything(client) for client in slow]
        until(lambda: service.connections() <= 1)

    assert lone.status_code == 200
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
    assert b'{"detail":"request body not complete after 2 s (body_timeout_s)"}' in answers[0]
    assert service.stats()["outcomes"]["rejected"] == 300


@pytest.mark.parametrize(
    "first", [b"", b"POST /v1/score HTTP/1.1\r\nhost: x\r\n"], ids=["silent", "half of its headers"]
)
def test_clients_that_never_finish_their_headers_are_cut(
    serving: Callable[..., Service], until: Until, first: bytes
) -> None:
    service = serving(header_timeout_s=1.0)
    with clients(service, 50, first) as slow:
        lone = score(service)
        answers = [everything(client) for client in slow]
        until(lambda: service.connections() <= 1)

    assert lone.status_code == 200
    assert answers == [b""] * 50
    assert service.cut("headers") == 50


def trickle(client: socket.socket, piece: bytes) -> None:
    """Send again and again, until the other side closes."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if select.select([client], [], [], 0.02)[0]:
            return
        try:
            client.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            return
    pytest.fail("the service did not end the connection within 60 s")


def test_a_trickle_does_not_put_a_time_limit_off(serving: Callable[..., Service]) -> None:
    service = serving(header_timeout_s=0.5, body_timeout_s=0.5)
    with clients(service, 1, b"GET /health/live HTTP/1.1\r\n") as [headers], clients(service, 1, head(900)) as [body]:
        trickle(headers, b"a: b\r\n")
        trickle(body, b" ")

    assert service.cut("headers") == 1
    assert service.stats()["outcomes"]["rejected"] == 1


def test_headers_on_a_kept_connection_have_the_same_limit(serving: Callable[..., Service]) -> None:
    service = serving(header_timeout_s=0.5)
    with clients(service, 1, REQUEST) as [client]:
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(65536)
        client.sendall(b"GET /health/live HTTP/1.1\r\n")
        trickle(client, b"a: b\r\n")

    assert (service.cut("headers"), score(service).status_code) == (1, 200)


def test_headers_without_end_are_cut(serving: Callable[..., Service]) -> None:
    service = serving(header_timeout_s=60.0)
    with clients(service, 1, b"GET /health/live HTTP/1.1\r\n") as [client]:
        trickle(client, b"name: " + b"x" * 8000 + b"\r\n")

    assert score(service).status_code == 200


def test_an_answer_that_nobody_reads_ends_the_connection(serving: Callable[..., Service], until: Until) -> None:
    service = serving(send_timeout_s=0.5)
    many = posted(json.dumps({"user_id": 1, "items": list(range(1000))}).encode())
    with clients(service, 1, b"") as [client]:
        client.setblocking(False)
        pending = many * 300  # answers of 100 kB each: more than the sockets hold

        def cut() -> bool:
            nonlocal pending
            try:
                pending = pending[client.send(pending) :]
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                return True
            return service.cut("unread") == 1

        until(cut)

    assert score(service).status_code == 200


def test_a_connection_too_many_is_answered_503(serving: Callable[..., Service], until: Until) -> None:
    service = serving(max_connections=5, header_timeout_s=60.0)
    with clients(service, 5, b""):
        until(lambda: service.connections() == 5)
        with socket.create_connection(service.address, timeout=60) as one_more:
            refused = everything(one_more)
    until(lambda: service.connections() == 0)

    assert refused.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"\r\nretry-after: 1\r\n" in refused
    assert refused.endswith(b'{"detail":"too many connections"}')
    assert score(service).status_code == 200
    assert service.cut("limit") == 1


def test_a_stop_under_load_ends_in_time_and_without_a_traceback(serving: Callable[..., Service], until: Until) -> None:
    service = serving(
        score_s=1.0, max_together=1, shutdown_s=6, max_age_s=60.0, header_timeout_s=60.0, body_timeout_s=60.0
    )
    with (
        clients(service, 150, REQUEST) as callers,
        clients(service, 20, head(900_000) + b"x" * 800_000),
        clients(service, 20, b"POST /v1/score HT"),
        clients(service, 5, b""),
    ):
        until(lambda: len(answered(callers)) + service.stats()["waiting"] + 2 >= len(callers))  # 2 are being scored
        begun_s = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        exit_code = service.process.wait(60)
        took_s = time.monotonic() - begun_s
        answers = [everything(caller).split(b" ", 2)[1:2] for caller in callers]

    assert exit_code == 0
    assert took_s < HANG_S  # to score for all of them would take 75 s
    assert "Traceback" not in service.log.read_text()
    assert {status for answer in answers for status in answer} == {b"200", b"503"}
    assert all(answers)  # each caller has one


@pytest.mark.parametrize("base", [H11Protocol, HttpToolsProtocol])
def test_both_protocols_of_uvicorn_keep_the_limits(
    make_app: Callable[..., FastAPI], base: type[asyncio.Protocol], until: Until
) -> None:
    app = make_app()
    limits = ScorerConfig(header_timeout_s=0.5, max_connections=2)
    http = bounded_protocol(limits, app.state.telemetry, base)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=http, ws="none", lifespan="on", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        address = server.servers[0].sockets[0].getsockname()
        half = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
        with (
            socket.create_connection(address, timeout=60) as kept,
            socket.create_connection(address, timeout=60) as cut,
        ):
            kept.sendall(half + b"\r\n")
            alive = kept.recv(65536)
            cut.sendall(half)
            with socket.create_connection(address, timeout=60) as one_more:
                refused = everything(one_more)
            nothing = everything(cut)
    finally:
        server.should_exit = True
        thread.join()

    assert alive.startswith(b"HTTP/1.1 200 OK")
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert nothing == b""


def test_the_limit_of_connections_leaves_room_in_the_usual_limit_of_open_files() -> None:
    assert ScorerConfig().max_connections + 100 < 1024
