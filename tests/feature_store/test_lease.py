"""The publisher's lease, on a real server: one publisher at a time, and a zombie's commit is refused."""

import threading
import time
from collections.abc import Callable

import pytest
import redis

from feature_store.publication import Manifest
from feature_store.snapshots import SnapshotStore
from smes.errors import FeatureStoreUnavailable, LeaseHeld, LeaseLost
from smes_io.redis_client import connect
from tests.running import valkey_server

from .test_snapshots import InterruptedClient


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    return SnapshotStore(client, namespace)


def publish(store: SnapshotStore, version: int, fencing: int | None, lineage: str = "a") -> Manifest:
    return store.publish(
        b"payload", lineage=lineage, version=version, schema_hash="h", step=version, created_ms=1, fencing=fencing
    )


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true within 60 s"
        threading.Event().wait(0.005)


def expire(client: redis.Redis, namespace: str) -> None:
    """Let the lease end by Redis' own clock."""
    client.pexpire(f"{{{namespace}}}:snapshots:lease", 1)
    wait_for(lambda: not client.exists(f"{{{namespace}}}:snapshots:lease"))


def test_a_second_holder_is_told_who_holds_it_since_when_and_until_when(store: SnapshotStore) -> None:
    before_ms = time.time_ns() // 1_000_000
    store.acquire("host-1, process 7", 60)

    with pytest.raises(LeaseHeld, match=r"held by host-1, process 7 since 20.*, until 20") as refused:
        store.acquire("host-2", 60)

    assert refused.value.holder == "host-1, process 7"
    assert before_ms - 5_000 <= refused.value.since_ms <= before_ms + 60_000
    assert 0 < refused.value.until_ms - refused.value.since_ms <= 61_000


def test_numbers_grow(client: redis.Redis, namespace: str, store: SnapshotStore) -> None:
    numbers = []
    for _ in range(5):
        lease = store.acquire("one", 60)
        numbers.append(lease.number)
        lease.release()

    assert numbers == sorted(set(numbers))


def test_a_released_lease_is_free_at_once_and_released_twice(store: SnapshotStore) -> None:
    first = store.acquire("one", 60)
    first.release()
    second = store.acquire("two", 60)

    first.release()  # must not release the second one's

    with pytest.raises(LeaseHeld, match="two"):
        store.acquire("three", 60)
    second.renew()


def test_renewing_moves_the_end(client: redis.Redis, namespace: str, store: SnapshotStore) -> None:
    lease = store.acquire("one", 60)
    client.pexpire(f"{{{namespace}}}:snapshots:lease", 5_000)

    lease.renew()

    assert 50_000 < client.pttl(f"{{{namespace}}}:snapshots:lease") <= 60_000


def test_an_expired_lease_that_nobody_took_is_renewed(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    lease = store.acquire("one", 60)
    expire(client, namespace)

    published = publish(store, 1, lease.number)
    lease.renew()

    assert store.current() == published
    with pytest.raises(LeaseHeld, match="one"):
        store.acquire("two", 60)


def test_a_zombie_can_neither_renew_nor_publish(client: redis.Redis, namespace: str, store: SnapshotStore) -> None:
    zombie = store.acquire("zombie", 60)
    expire(client, namespace)
    holder = store.acquire("holder", 60)
    published = publish(store, 1, holder.number)

    with pytest.raises(LeaseLost, match="held by holder since"):
        zombie.renew()
    with pytest.raises(LeaseLost, match="held by holder since"):
        publish(store, 2, zombie.number)
    holder.release()
    with pytest.raises(LeaseLost, match="another publisher has held it since"):
        zombie.renew()
    with pytest.raises(LeaseLost, match="another publisher has held it since"):
        publish(store, 2, zombie.number)

    assert store.current() == published


def test_a_lease_taken_over_during_the_upload_is_refused_by_the_commit(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    zombie = store.acquire("zombie", 60)

    def take_over(_: str) -> None:
        expire(client, namespace)
        store.acquire("holder", 60)

    slow = SnapshotStore(InterruptedClient(client, 0, take_over), namespace)

    with pytest.raises(LeaseLost, match="held by holder"):
        publish(slow, 1, zombie.number)

    assert store.fenced()[0] == 1
    assert store.current() is None
    assert list(client.scan_iter(f"{{{namespace}}}:snapshots:chunk:*")) == []


def test_without_a_number_one_may_publish_only_while_nobody_holds_the_lease(store: SnapshotStore) -> None:
    published = publish(store, 1, None)
    lease = store.acquire("one", 60)

    with pytest.raises(LeaseHeld, match="held by one"):
        publish(store, 2, None)

    assert store.current() == published
    lease.release()
    assert publish(store, 2, None) == store.current()


@pytest.mark.parametrize("key", ["lease", "fencing"])
@pytest.mark.parametrize("junk", ["junk", "9:9:ab:somebody", "99999999999999999999", "", None])
def test_junk_is_no_lease(
    client: redis.Redis, namespace: str, store: SnapshotStore, key: str, junk: str | None
) -> None:
    before = store.acquire("one", 60)
    before.release()
    name = f"{{{namespace}}}:snapshots:{key}"
    client.delete(name)
    client.rpush(name, "a list") if junk is None else client.set(name, junk)

    lease = store.acquire("one", 60)
    lease.renew()

    assert lease.number > before.number
    assert publish(store, 1, lease.number) == store.current()
    with pytest.raises(LeaseHeld, match="held by one"):
        store.acquire("two", 60)


def test_a_server_that_came_back_empty_knows_the_holder_again() -> None:
    with valkey_server() as server:
        client = connect(server.connection_url, 30.0)
        store = SnapshotStore(client, "lost")
        lease = store.acquire("one", 60)

        client.flushall()
        assert publish(store, 1, lease.number) == store.current()
        lease.renew()
        with pytest.raises(LeaseHeld, match="held by one"):
            store.acquire("two", 60)

        client.flushall()
        second = store.acquire("two", 60)
        assert second.number > lease.number
        with pytest.raises(LeaseLost, match="held by two"):
            lease.renew()
        client.close()


def test_a_lease_is_not_waited_for_longer_than_the_bound() -> None:
    with valkey_server() as server:
        client = connect(server.connection_url, 1.0)
        store = SnapshotStore(client, "away", outage_timeout_s=0.2)
        lease = store.acquire("one", 60)

    with pytest.raises(FeatureStoreUnavailable, match=r"gave no answer within 0.2 s while the publisher's lease"):
        lease.renew()
    lease.release()  # it expires by itself
    client.close()


@pytest.mark.parametrize(("holder", "ttl_s"), [("", 1.0), ("x" * 201, 1.0), ("x", 0.0), ("x", 3601.0)])
def test_an_argument_out_of_range_is_named(store: SnapshotStore, holder: str, ttl_s: float) -> None:
    with pytest.raises(ValueError, match=r"^lease (holder|ttl_s): "):
        store.acquire(holder, ttl_s)
