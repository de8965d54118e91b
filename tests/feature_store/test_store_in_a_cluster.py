"""Snapshots, the lease and entity features in a Redis Cluster, also while their keys move to another node."""

from collections.abc import Iterator

import numpy as np
import pytest
import redis

from feature_store.config import SnapshotStoreConfig
from feature_store.entities import EntityStore
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.errors import FeatureStoreUnavailable, LeaseHeld
from smes.schema import Feature, Schema, Task
from smes_io.redis_access import RedisAccess, key_prefix
from smes_io.redis_client import connect
from tests.secure_servers import RedisCluster

SCHEMA = Schema("cluster", (Task("click"),), (Feature("age", "numeric", source="user"),))
CHUNKS = SnapshotStoreConfig(chunk_bytes=100)


@pytest.fixture
def client(cluster: RedisCluster, namespace: str) -> Iterator[redis.Redis]:
    """Through a node that has none of the keys."""
    seed = cluster.url((cluster.owner(key_prefix(namespace)) + 1) % 3)
    with connect(seed, 10.0, access=RedisAccess(cluster=True), namespace=namespace) as client:
        yield client


def publish(store: SnapshotStore, version: int, fencing: int | None = None) -> bytes:
    """A payload of several chunks."""
    payload = np.random.default_rng(version).bytes(950)
    store.publish(payload, lineage="a", version=version, schema_hash="h", step=version, created_ms=1, fencing=fencing)
    return payload


def move(cluster: RedisCluster, namespace: str) -> None:
    key = key_prefix(namespace)
    cluster.move(key, (cluster.owner(key) + 1) % 3)


def test_publications_go_on_while_the_keys_move(cluster: RedisCluster, client: redis.Redis, namespace: str) -> None:
    store = SnapshotStore(client, namespace, CHUNKS, outage_timeout_s=20.0)
    lease = store.acquire("the test", 60.0)
    for version in range(1, 5):
        payload = publish(store, version, fencing=lease.number)
        current = store.current()
        assert current is not None
        assert (current.version, len(current.chunks)) == (version, 10)
        assert store.load(current) == payload

        move(cluster, namespace)
        lease.renew()
        with pytest.raises(LeaseHeld, match="the test"):
            store.acquire("another", 60.0)

    assert [manifest.version for manifest in store.list()] == [1, 2, 3, 4]
    assert store.damage.count == 0


def test_every_key_lies_under_the_hash_tag(cluster: RedisCluster, client: redis.Redis, namespace: str) -> None:
    store = SnapshotStore(client, namespace, CHUNKS)
    publish(store, 1)
    lease = store.acquire("the test", 60.0)
    EntityStore(client, SCHEMA, namespace).put_many("user", np.arange(5), {"age": np.ones(5, np.float32)})
    keys = [bytes(key) for node in cluster.nodes for key in node.scan_iter(f"*{namespace}*")]

    assert len(keys) >= 10 + 5 + 5
    assert {key.startswith(f"{key_prefix(namespace)}:".encode()) for key in keys} == {True}
    lease.release()


def test_a_reader_finds_the_keys_at_their_new_node(cluster: RedisCluster, client: redis.Redis, namespace: str) -> None:
    writer = SnapshotStore(client, namespace, CHUNKS, outage_timeout_s=20.0)
    publish(writer, 1)
    with connect(cluster.url(), 10.0, access=RedisAccess(cluster=True), namespace=namespace) as other:
        reader, watcher = SnapshotStore(other, namespace), SnapshotWatcher(other, namespace, poll_s=0.05)
        assert watcher.wait(10.0)
        move(cluster, namespace)
        expected = publish(writer, 2)

        assert watcher.wait(10.0)
        current = reader.current()
        assert current is not None
        assert reader.load(current) == expected
        assert watcher.problem is None

        move(cluster, namespace)
        with pytest.raises(FeatureStoreUnavailable, match="MOVED"):
            reader.list()
        assert [manifest.version for manifest in reader.list()] == [1, 2]
        watcher.close()


def test_features_are_found_at_their_new_node(cluster: RedisCluster, client: redis.Redis, namespace: str) -> None:
    store = EntityStore(client, SCHEMA, namespace)
    store.put_many("user", np.arange(3000), {"age": np.arange(3000, dtype=np.float32)})
    move(cluster, namespace)

    with pytest.raises(FeatureStoreUnavailable, match="could not serve while features were read: MOVED"):
        store.get(7, np.array([1]))
    assert store.get(7, np.array([1])).numerics.tolist() == [[7.0]]
    assert store.clear() == 3000


def test_operators_decide_while_the_keys_move(cluster: RedisCluster, client: redis.Redis, namespace: str) -> None:
    store = SnapshotStore(client, namespace, CHUNKS, outage_timeout_s=20.0)
    for version in (1, 2, 3):
        publish(store, version)

    served = []
    for wanted in (2, 1, 3, None):
        if wanted is None:
            store.operator.unpin(by="a test")
        else:
            store.operator.pin(wanted, by="a test")
        manifest = store.to_serve()
        served.append(None if manifest is None else manifest.version)
        move(cluster, namespace)

    store.operator.pin(1, by="a test")  # so that reads find the keys, too
    assert served == [2, 1, 3, 3]
    assert [decision.version for decision in store.decisions()] == [*served, 1]
    assert store.damage.count == 0
