"""The demo's own servers: what they keep, where they listen, and their errors when they cannot start."""

import os
import signal
import socketserver
import threading
import uuid
from pathlib import Path

import psutil
import pytest
import redis

from smes_cli.demo.local_servers import LocalServerError, cluster_id, start_kafka, start_valkey


def test_valkey_keeps_what_it_acknowledged_when_it_is_killed(tmp_path: Path) -> None:
    first = start_valkey(tmp_path / "data")
    with redis.Redis.from_url(first.url) as client:
        client.set("key", "kept")
    os.kill(first.pid, signal.SIGKILL)
    first.stop()
    with start_valkey(tmp_path / "data") as second, redis.Redis.from_url(second.url) as client:
        assert client.get("key") == b"kept"


def test_valkey_listens_on_loopback_only_and_is_gone_after_the_block(tmp_path: Path) -> None:
    with start_valkey(tmp_path) as server:
        listening = {c.laddr for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening == {("127.0.0.1", server.port)}
    assert server.process.returncode is not None
    server.stop()


def test_the_error_of_a_valkey_that_cannot_start_holds_its_output(tmp_path: Path) -> None:
    with (
        start_valkey(tmp_path / "one") as server,
        pytest.raises(LocalServerError, match=r"Valkey did not start: exited with status 1(.|\n)*in use"),
    ):
        start_valkey(tmp_path / "two", port=server.port, timeout_s=300)


@pytest.mark.parametrize(
    "answer", [b"-ERR not yours\r\n", b"-NOAUTH first log in\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"]
)
def test_whatever_else_answers_at_the_port_the_error_is_that_of_the_start(tmp_path: Path, answer: bytes) -> None:
    class Other(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(4096):
                self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Other) as other:
        other.daemon_threads = True
        threading.Thread(target=other.serve_forever, daemon=True).start()
        try:
            with pytest.raises(LocalServerError, match=r"Valkey did not start: exited with status 1(.|\n)*in use"):
                start_valkey(tmp_path, port=other.server_address[1], timeout_s=300)
        finally:
            other.shutdown()


def test_a_folder_without_kafka_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalServerError, match=r"expected .*(java.* on PATH|libs folder at KAFKA_HOME=)"):
        start_kafka(tmp_path, tmp_path / "data")


def test_the_error_of_a_broken_distribution_holds_its_output(tmp_path: Path, kafka_home: Path) -> None:
    assert kafka_home
    (tmp_path / "home" / "libs").mkdir(parents=True)
    with pytest.raises(LocalServerError, match=r"formatting its storage ended with status 1(.|\n)*StorageTool"):
        start_kafka(tmp_path / "home", tmp_path / "data")


def test_no_cluster_id_looks_like_an_option() -> None:
    # as base64, the bytes 0xf8 … 0xfb at the front start with "-": one random id in 64
    ids = [cluster_id(uuid.UUID(bytes=bytes((first, *range(15))))) for first in range(256)]
    assert not [cluster for cluster in ids if cluster.startswith("-")]
    assert {len(cluster) for cluster in ids} == {22}
