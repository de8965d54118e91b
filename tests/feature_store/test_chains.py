"""Deltas and bases on a real server: what is loaded for a version, and what retention keeps.

Payloads are opaque here: their bytes say which version they are of. :mod:`tests.trainer.test_deltas` shows that what
they hold adds up.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from feature_store.manifest import Manifest
from feature_store.pieces import Payload
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.errors import LeaseHeld, LeaseLost, SnapshotError, SnapshotGap, SnapshotNotFound
from tests.feature_store.stores import make_store
from tests.feature_store.test_snapshots import InterruptedClient

FULL, DELTA = 4000, 1500
"""Bytes of the payloads, in chunks of 1,000."""


def publish(
    store: SnapshotStore, version: int, *, full: bool = False, lineage: str = "a", fencing: int | None = None
) -> Manifest:
    """A full snapshot, or a delta to the version before."""
    return store.publish(
        bytes([version]) * (FULL if full else DELTA),
        lineage=lineage,
        version=version,
        schema_hash="0123456789abcdef",
        step=version,
        created_ms=1_700_000_000_000,
        applies_to=None if full else {version - 1},
        fencing=fencing,
    )


def base_of(manifest: Manifest) -> Payload:
    return Payload(FULL, lambda: iter([bytes([manifest.version]) * (FULL - 1), bytes([manifest.version])]))


def chunk_keys(client: redis.Redis, namespace: str) -> set[bytes]:
    return {key for key in client.scan_iter(f"{{{namespace}}}:snapshots:chunk:*") if isinstance(key, bytes)}


def way(store: SnapshotStore, manifest: Manifest, have: int | None = None) -> list[tuple[str, int]]:
    """Kind and version of what is to be loaded; each of it is loaded."""
    chain = store.chain(manifest, have)
    for part in chain:
        assert store.load(part) == bytes([part.version]) * (FULL if part.kind == "full" else DELTA)
    return [(part.kind, part.version) for part in chain]


def test_a_delta_follows_a_full_snapshot(store: SnapshotStore) -> None:
    first = publish(store, 1, full=True)
    second, third = publish(store, 2), publish(store, 3)

    assert (first.kind, second.kind, second.parent, third.parent) == ("full", "delta", 1, 2)
    assert store.current() == third
    assert store.list() == (first, second, third)
    assert way(store, third) == [("full", 1), ("delta", 2), ("delta", 3)]
    assert way(store, third, have=1) == [("delta", 2), ("delta", 3)]
    assert way(store, third, have=2) == [("delta", 3)]
    assert way(store, first, have=7) == [("full", 1)]
    assert way(store, third, have=77) == [("full", 1), ("delta", 2), ("delta", 3)]


def test_a_base_is_found_by_what_starts_late_and_moves_nothing(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    publish(store, 1, full=True)
    second, third = publish(store, 2), publish(store, 3)
    watcher = SnapshotWatcher(client, namespace, poll_s=0.05)
    assert watcher.wait(5.0)

    base = store.publish_base(base_of(second), second)  # late: the next version is there already

    assert not watcher.wait(0.3)
    watcher.close()
    assert store.current() == third
    assert store.list()[-1] == third
    assert store.get("a", 2) == second
    assert store.bases(store.list()) == {("a", 2): base}
    assert (base.kind, base.version, base.metrics) == ("full", 2, {})
    assert way(store, second) == [("full", 2)]
    assert way(store, third) == [("full", 2), ("delta", 3)]
    assert way(store, publish(store, 4)) == [("full", 2), ("delta", 3), ("delta", 4)]


def test_of_two_ways_the_one_with_fewer_bytes_is_taken(store: SnapshotStore) -> None:
    publish(store, 1, full=True)
    manifests = [publish(store, version) for version in range(2, 9)]
    store.publish_base(base_of(manifests[4]), manifests[4])  # of version 6

    assert way(store, manifests[-1], have=6) == [("delta", 7), ("delta", 8)]
    assert way(store, manifests[-1], have=4) == [("delta", v) for v in (5, 6, 7, 8)]  # 6,000 bytes against 7,000
    assert way(store, manifests[-1], have=3) == [("full", 6), ("delta", 7), ("delta", 8)]  # 7,500
    assert way(store, manifests[-1]) == [("full", 6), ("delta", 7), ("delta", 8)]


def test_a_delta_to_another_version_than_the_current_one_is_refused(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    first = publish(store, 1, full=True)

    with pytest.raises(SnapshotGap, match="snapshot a:9: a:1 is current, expected version 8, to which it applies"):
        publish(store, 9)
    with pytest.raises(SnapshotGap, match="snapshot b:2: another lineage is current, expected version 1"):
        publish(store, 2, lineage="b")

    assert store.current() == first
    assert len(chunk_keys(client, namespace)) == 4


def test_the_commit_itself_refuses_a_delta_to_what_is_not_current_any_more(client: redis.Redis, namespace: str) -> None:
    """Another version became current while the delta was uploaded."""
    store = make_store(client, namespace)
    publish(store, 1, full=True)
    publish(store, 2)
    back = client.get(f"{{{namespace}}}:snapshots:current")

    def restored(_: str) -> None:
        client.set(f"{{{namespace}}}:snapshots:current", "a:1")

    slow = make_store(InterruptedClient(client, 0, restored), namespace)
    with pytest.raises(SnapshotGap, match="snapshot a:3: a:1 is current, expected a:2, to which it applies"):
        publish(slow, 3)

    assert back == b"a:2"
    assert len(chunk_keys(client, namespace)) == 4 + 2


@pytest.mark.parametrize("lost", ["a chunk of the full one", "a chunk between", "the manifest between", "everything"])
def test_a_delta_whose_chain_is_broken_is_refused_and_a_full_one_mends_it(
    client: redis.Redis, namespace: str, store: SnapshotStore, lost: str
) -> None:
    first = publish(store, 1, full=True)
    second, _ = publish(store, 2), publish(store, 3)
    prefix = f"{{{namespace}}}:snapshots:"
    if lost == "everything":
        client.delete(*[key for key in client.scan_iter(f"{prefix}*") if isinstance(key, bytes)])
    elif lost == "the manifest between":
        client.zrem(f"{prefix}index", "a:2")
        client.hdel(f"{prefix}manifests", "a:2")
    else:
        client.delete(f"{prefix}chunk:{(first if 'full' in lost else second).upload}:1")

    with pytest.raises(SnapshotGap):
        publish(store, 4)
    mended = publish(store, 4, full=True)

    assert way(store, mended) == [("full", 4)]
    assert way(store, publish(store, 5)) == [("full", 4), ("delta", 5)]


def test_what_is_missing_on_the_way_is_named_and_a_base_after_it_is_enough(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    publish(store, 1, full=True)
    manifests = [publish(store, version) for version in (2, 3, 4, 5)]
    client.hdel(f"{{{namespace}}}:snapshots:manifests", "a:3")
    reader = make_store(client, namespace)

    with pytest.raises(SnapshotError, match="snapshot a:5: a:3 is not listed, expected every version back to one with"):
        reader.chain(manifests[-1])
    assert way(reader, manifests[-1], have=3) == [("delta", 4), ("delta", 5)]

    store.publish_base(base_of(manifests[2]), manifests[2])  # of version 4
    assert way(reader, manifests[-1]) == [("full", 4), ("delta", 5)]
    assert way(reader, manifests[-1], have=1) == [("full", 4), ("delta", 5)]


@pytest.mark.parametrize("junk", [b"junk", b"", b"{}", b"x" * 5_000_000], ids=["junk", "empty", "object", "five MB"])
def test_a_broken_base_is_stepped_over(client: redis.Redis, namespace: str, store: SnapshotStore, junk: bytes) -> None:
    publish(store, 1, full=True)
    second = publish(store, 2)
    client.hset(f"{{{namespace}}}:snapshots:bases", "a:2", junk)

    assert way(store, second) == [("full", 1), ("delta", 2)]
    assert way(store, publish(store, 3)) == [("full", 1), ("delta", 2), ("delta", 3)]


def test_a_base_that_is_a_delta_or_another_versions_is_stepped_over(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    first = publish(store, 1, full=True)
    second = publish(store, 2)
    for lie in (second, first):
        client.hset(f"{{{namespace}}}:snapshots:bases", "a:2", lie.to_json())
        assert way(store, second) == [("full", 1), ("delta", 2)]
    assert store.damage.count == 2


def test_bases_of_another_kind_of_value_are_put_aside(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    publish(store, 1, full=True)
    client.rpush(f"{{{namespace}}}:snapshots:bases", "x")

    second = publish(store, 2)

    base = store.publish_base(base_of(second), second)
    assert store.bases([second]) == {("a", 2): base}


def test_retention_removes_whole_chains_only(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=20_000)
    for version in range(1, 31):
        manifest = publish(store, version, full=version == 1)
        if version % 5 == 0:
            store.publish_base(base_of(manifest), manifest)

        assert len(way(store, manifest)) <= 6
        for kept in store.list():  # whatever is listed can be loaded from nothing
            assert way(store, kept)[0][0] == "full"

    # A chain has 5 deltas and a base: 11,500 bytes. One and the beginning of the next fit.
    assert [m.version for m in store.list()] == [25, 26, 27, 28, 29, 30]
    assert len(chunk_keys(client, namespace)) == 6 * 2 + 2 * 4
    assert set(client.hkeys(f"{{{namespace}}}:snapshots:bases")) == {b"a:25", b"a:30"}
    with pytest.raises(SnapshotNotFound, match="snapshot a:24: retention removed it"):
        store.chain(store.get("a", 24))


def test_a_chain_that_the_current_version_needs_stays_whatever_its_size(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=1, min_retained=1)
    first = publish(store, 1, full=True)
    for version in range(2, 8):
        newest = publish(store, version)

    assert way(store, newest) == [("full", 1), *(("delta", v) for v in range(2, 8))]

    base = store.publish_base(base_of(newest), newest)
    last = publish(store, 8)

    assert way(store, last) == [("full", 7), ("delta", 8)]
    assert [m.version for m in store.list()] == [7, 8]
    with pytest.raises(SnapshotNotFound, match="snapshot a:1: retention removed it"):
        store.load(first)
    assert store.load(base) == bytes([7]) * FULL


def test_a_chain_that_is_removed_while_it_is_read_is_not_found(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=1, min_retained=1)
    publish(store, 1, full=True)
    second = publish(store, 2)
    late = store.chain(second)
    publish(store, 3, full=True)
    publish(store, 4)

    for part in late:
        with pytest.raises(SnapshotNotFound, match=f"snapshot a:{part.version}: retention removed it"):
            store.load(part)


_DYING = """
import os, signal, sys
from tests.feature_store import test_chains as chains
from smes_io.redis_client import connect
client = chains.InterruptedClient(connect(sys.argv[1], 30.0), 3, lambda key: os.kill(os.getpid(), signal.SIGKILL))
store = chains.make_store(client, sys.argv[2])
store.publish_base(chains.base_of(store.get("a", 2)), store.get("a", 2))
"""


def test_a_base_whose_publisher_was_killed_is_no_base_and_its_chunks_are_removed(
    client: redis.Redis, redis_url: str, namespace: str, store: SnapshotStore
) -> None:
    publish(store, 1, full=True)
    second = publish(store, 2)
    before = chunk_keys(client, namespace)

    argv = [sys.executable, "-P", "-c", _DYING, redis_url, namespace]
    died = subprocess.run(argv, cwd=Path(__file__).parents[2], check=False)

    assert died.returncode == -signal.SIGKILL
    orphans = chunk_keys(client, namespace) - before
    assert len(orphans) == 4
    assert all(0 < int(client.ttl(key)) <= 600 for key in orphans)
    assert way(store, second) == [("full", 1), ("delta", 2)]
    publish(store, 3)
    assert not orphans & chunk_keys(client, namespace)


def test_versions_are_published_while_a_base_is_uploaded(client: redis.Redis, namespace: str) -> None:
    """The base's upload is not taken for an abandoned one."""
    store = make_store(client, namespace)
    publish(store, 1, full=True)
    second = publish(store, 2)
    half, go_on = threading.Event(), threading.Event()

    def pieces() -> Iterator[bytes]:
        yield bytes([2]) * (FULL // 2)
        half.set()
        assert go_on.wait(60)
        yield bytes([2]) * (FULL // 2)

    bases: list[Manifest] = []
    uploading = threading.Thread(
        target=lambda: bases.append(store.publish_base(Payload(FULL, pieces), second)), daemon=True
    )
    uploading.start()
    assert half.wait(60)
    third = publish(store, 3)
    assert way(store, third) == [("full", 1), ("delta", 2), ("delta", 3)]
    go_on.set()
    uploading.join(60)

    assert way(store, third) == [("full", 2), ("delta", 3)]
    assert client.hlen(f"{{{namespace}}}:snapshots:uploads") == 0


def test_a_base_of_a_version_that_went_meanwhile_is_dropped(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=1, min_retained=1)
    publish(store, 1, full=True)
    second = publish(store, 2)
    publish(store, 3, full=True)
    publish(store, 4)
    before = chunk_keys(client, namespace)

    with pytest.raises(SnapshotNotFound, match="snapshot a:2: retention removed it before its base was complete"):
        store.publish_base(base_of(second), second)

    assert chunk_keys(client, namespace) == before
    assert client.hlen(f"{{{namespace}}}:snapshots:bases") == 0


def test_a_zombie_can_publish_neither_a_delta_nor_a_base(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    zombie = store.acquire("zombie", 60.0)
    publish(store, 1, full=True, fencing=zombie.number)
    second = publish(store, 2, fencing=zombie.number)
    taken: list[int] = []

    def take_over(_: str) -> None:
        if not taken:
            client.delete(f"{{{namespace}}}:snapshots:lease")  # it expired
            taken.append(store.acquire("heir", 60.0).number)

    slow = make_store(InterruptedClient(client, 3, take_over), namespace)
    with pytest.raises(LeaseLost, match="held by heir"):
        slow.publish_base(base_of(second), second, fencing=zombie.number)
    with pytest.raises(LeaseLost, match="held by heir"):
        publish(store, 3, fencing=zombie.number)
    with pytest.raises(LeaseHeld, match="held by heir"):
        publish(store, 3, fencing=None)

    assert store.bases([second]) == {}
    assert store.current() == second
    third = publish(store, 3, fencing=taken[0])
    base = store.publish_base(base_of(third), third, fencing=taken[0])
    assert store.bases([second, third]) == {("a", 3): base}
    assert client.hlen(f"{{{namespace}}}:snapshots:uploads") == 0


def test_a_commit_of_a_base_whose_answer_was_lost_may_be_sent_again(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    publish(store, 1, full=True)
    second = publish(store, 2)
    base = store.publish_base(base_of(second), second)

    store._publication.commit_base(base)

    assert way(store, second) == [("full", 2)]
