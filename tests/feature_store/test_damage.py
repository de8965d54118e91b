"""Junk in the snapshots' keys, on a real server: publishing and loading go on, and the log names what is broken."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import redis
from msgspec.structs import replace

from feature_store.manifest import MAX_CHUNKS, Chunk, Manifest
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.errors import SnapshotError, SnapshotNotFound
from tests.feature_store.stores import make_store

Junk = Callable[[redis.Redis, str], object]
"""Breaks something, given a client and the prefix of the keys; versions 1, 2 and 3 of lineage a are published."""

BIG = 5 * 1024 * 1024


def publish(store: SnapshotStore, version: int, lineage: str = "a", **more: Any) -> Manifest:
    payload = bytes([version]) * 2500
    return store.publish(
        payload, lineage=lineage, version=version, schema_hash="h", step=version, created_ms=version, **more
    )


def listed(client: redis.Redis, prefix: str) -> None:
    client.delete(prefix)
    client.rpush(prefix, "a", "list")


def change(client: redis.Redis, prefix: str, name: str, **fields: object) -> None:
    """Change fields of a stored manifest."""
    text = client.hget(f"{prefix}manifests", name)
    assert text is not None
    client.hset(f"{prefix}manifests", name, json.dumps(json.loads(text) | fields))


def raw_change(client: redis.Redis, prefix: str, name: str, before: str, after: str) -> None:
    text = client.hget(f"{prefix}manifests", name)
    assert isinstance(text, bytes)
    assert before in text.decode()
    client.hset(f"{prefix}manifests", name, text.decode().replace(before, after))


def flipped(client: redis.Redis, prefix: str, name: str) -> None:
    text = client.hget(f"{prefix}manifests", name)
    assert isinstance(text, bytes)
    client.hset(f"{prefix}manifests", name, bytes([text[0], text[1] ^ 4, *text[2:]]))


def upload_named_as_committed(client: redis.Redis, prefix: str) -> None:
    manifest = json.loads(client.hget(f"{prefix}manifests", "a:3") or b"")
    begun = json.dumps({"lineage": "a", "chunks": 3, "begun_s": 0})
    client.hset(f"{prefix}uploads", manifest["upload"], begun)


POINTER: dict[str, Junk] = {
    "junk": lambda c, p: c.set(f"{p}current", "junk"),
    "bytes": lambda c, p: c.set(f"{p}current", b"\xff\xfe:1"),
    "a list": lambda c, p: listed(c, f"{p}current"),
    "an absurd version": lambda c, p: c.set(f"{p}current", "a:99999999999999999999999"),
    "a version that nobody published": lambda c, p: c.set(f"{p}current", "a:9007199254740991"),
    "another alphabet's digits": lambda c, p: c.set(f"{p}current", "a:٣"),
    "five megabytes": lambda c, p: c.set(f"{p}current", b"x" * BIG),
    "missing": lambda c, p: c.delete(f"{p}current"),
    "its manifest flipped": lambda c, p: flipped(c, p, "a:3"),
    "its manifest gone": lambda c, p: c.hdel(f"{p}manifests", "a:3"),
}
BESIDE: dict[str, Junk] = {
    "uploads: junk": lambda c, p: c.hset(f"{p}uploads", "junk", "junk"),
    "uploads: a list of JSON": lambda c, p: c.hset(f"{p}uploads", "junk", "[1]"),
    "uploads: deep JSON": lambda c, p: c.hset(f"{p}uploads", "junk", "[" * 100_000),
    "uploads: bytes": lambda c, p: c.hset(f"{p}uploads", b"\xff", b"\xff"),
    "uploads: other fields": lambda c, p: c.hset(f"{p}uploads", "junk", '{"chunks": "x"}'),
    "uploads: negative chunks": lambda c, p: c.hset(f"{p}uploads", "u", '{"lineage": "a", "chunks": -1, "begun_s": 0}'),
    "uploads: ten million chunks": lambda c, p: c.hset(
        f"{p}uploads", "u", '{"lineage": "a", "chunks": 10000000, "begun_s": 0}'
    ),
    "uploads: begun in 10^400": lambda c, p: c.hset(
        f"{p}uploads", "u", '{"lineage": "b", "chunks": 1, "begun_s": 1' + "0" * 400 + "}"
    ),
    "uploads: a list": lambda c, p: listed(c, f"{p}uploads"),
    "uploads: five megabytes": lambda c, p: c.hset(f"{p}uploads", "u", "x" * BIG),
    "manifests: a list": lambda c, p: listed(c, f"{p}manifests"),
    "manifests: an old one flipped": lambda c, p: flipped(c, p, "a:1"),
    "manifests: an old one of five megabytes": lambda c, p: c.hset(f"{p}manifests", "a:1", "x" * BIG),
    "manifests: an old one is another's": lambda c, p: change(c, p, "a:1", lineage="b", upload="b:1:00"),
    "manifests: an old one names another's chunks": lambda c, p: change(c, p, "a:1", upload="a:3:00"),
    "manifests: an old one created in 10^400": lambda c, p: raw_change(
        c, p, "a:1", '"created_ms":1', '"created_ms":1' + "0" * 400
    ),
    "manifests: an old one created before 1970": lambda c, p: change(c, p, "a:1", created_ms=-5),
    "manifests: an old one with chunks of 2^53 bytes": lambda c, p: change(
        c, p, "a:1", total_bytes=2**53 - 1, chunks=[{"bytes": 2**53 - 1, "sha256": "0" * 64}]
    ),
    "manifests: an old one with metrics of absurd depth": lambda c, p: raw_change(
        c, p, "a:1", '"metrics":{', '"metrics":{"x":' + "[" * 5000 + "]" * 5000 + ","
    ),
    "manifests: an old one with absurd positions": lambda c, p: change(c, p, "a:1", positions={"i": {"0": 10**30}}),
    "manifests: a stranger": lambda c, p: c.hset(f"{p}manifests", "stranger", "junk"),
    "index: a stranger": lambda c, p: c.zadd(f"{p}index", {"stranger": 1.5}),
    "index: bytes": lambda c, p: c.zadd(f"{p}index", {b"\xff": -3}),
    "index: a name without a manifest": lambda c, p: c.zadd(f"{p}index", {"a:77": 2.5}),
    "index: an order of infinity": lambda c, p: c.zadd(f"{p}index", {"stranger": float("inf"), "a:1": 1e300}),
    "index: a list": lambda c, p: listed(c, f"{p}index"),
    "history: a stranger": lambda c, p: c.zadd(f"{p}history", {"stranger": 99}),
    "history: an order of infinity": lambda c, p: c.zadd(f"{p}history", {"stranger": float("inf"), "a:1": 1e300}),
    "history: a list": lambda c, p: listed(c, f"{p}history"),
    "sequence: junk": lambda c, p: c.set(f"{p}sequence", "junk"),
    "sequence: negative": lambda c, p: c.set(f"{p}sequence", "-5"),
    "sequence: gone": lambda c, p: c.delete(f"{p}sequence"),
    "sequence: the largest integer": lambda c, p: c.set(f"{p}sequence", 2**63 - 1),
    "sequence: a list": lambda c, p: listed(c, f"{p}sequence"),
}
QUIET = {"manifests: a stranger", "sequence: gone"}  # nothing reads the first; the second may be an old Redis


@pytest.mark.parametrize("junk", [*POINTER.values(), *BESIDE.values()], ids=[*POINTER, *BESIDE])
def test_publishing_goes_on(client: redis.Redis, namespace: str, store: SnapshotStore, junk: Junk) -> None:
    for version in (1, 2, 3):
        publish(store, version)
    junk(client, f"{{{namespace}}}:snapshots:")

    fourth, fifth = publish(store, 4), publish(store, 5)

    assert store.current() == fifth
    assert store.pointer_problem is None
    assert store.list()[-2:] == (fourth, fifth)
    assert store.manifests_between("a", 3, 5) == (fourth, fifth)
    assert store.load(fourth) == bytes([4]) * 2500
    assert client.hlen(f"{{{namespace}}}:snapshots:uploads") == 0


@pytest.mark.parametrize("what", [name for name in (*POINTER, *BESIDE) if name not in QUIET])
def test_what_is_broken_is_named_by_its_key_once(
    client: redis.Redis, namespace: str, store: SnapshotStore, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (1, 2, 3):
        publish(store, version)
    (POINTER | BESIDE)[what](client, f"{{{namespace}}}:snapshots:")
    key = f"{{{namespace}}}:snapshots:{what.partition(':')[0] if what in BESIDE else ''}"

    with caplog.at_level(logging.WARNING):
        publish(store, 4)
        publish(store, 5)

    named = [r.getMessage() for r in caplog.records if f"Redis key {key}" in r.getMessage()]
    assert named
    assert len(set(named)) == len(named) <= store.damage.count
    assert all(", expected " in message or ": expected " in message for message in named)


@pytest.mark.parametrize("junk", BESIDE.values(), ids=BESIDE)
def test_the_current_snapshot_is_served_whatever_lies_beside_it(
    client: redis.Redis, namespace: str, store: SnapshotStore, junk: Junk
) -> None:
    third = [publish(store, version) for version in (1, 2, 3)][-1]
    junk(client, f"{{{namespace}}}:snapshots:")
    reader = make_store(client, namespace)

    if client.type(f"{{{namespace}}}:snapshots:manifests") == b"list":
        with pytest.raises(SnapshotNotFound, match="a:3"):
            reader.current()
        return

    assert reader.current() == third
    assert reader.load(third) == bytes([3]) * 2500
    assert {m.version for m in reader.manifests_between("a", 0, 3)} <= {1, 2, 3}


@pytest.mark.parametrize("junk", POINTER.values(), ids=POINTER)
def test_a_broken_pointer_is_replaced_by_the_newest_that_can_be_read(
    client: redis.Redis, namespace: str, store: SnapshotStore, junk: Junk
) -> None:
    manifests = [publish(store, version) for version in (1, 2, 3)]
    junk(client, f"{{{namespace}}}:snapshots:")
    broken_too = junk in (POINTER["its manifest flipped"], POINTER["its manifest gone"])

    found = store.current()

    assert found == manifests[1 if broken_too else 2]
    assert f"Redis key {{{namespace}}}:snapshots:current: " in str(store.pointer_problem)


def test_where_nothing_can_be_read_that_is_no_empty_store(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    client.set(f"{{{namespace}}}:snapshots:current", "junk")

    with pytest.raises(SnapshotError, match="'junk', expected lineage:version") as error:
        store.current()

    assert not isinstance(error.value, SnapshotNotFound)
    assert publish(store, 1) == store.current()


@pytest.mark.parametrize("junk", POINTER.values(), ids=POINTER)
def test_the_watcher_survives_a_broken_pointer(
    client: redis.Redis, namespace: str, store: SnapshotStore, junk: Junk
) -> None:
    watcher = SnapshotWatcher(client, namespace, poll_s=0.05)
    publish(store, 1)
    publish(store, 2)
    publish(store, 3)
    assert watcher.wait(60)
    junk(client, f"{{{namespace}}}:snapshots:")
    watcher.wait(0)

    assert watcher.problem is None
    publish(store, 4)
    assert watcher.wait(60)
    watcher.close()
    watcher.wait(0)


def test_an_entry_that_declares_ten_million_chunks_costs_the_server_nothing(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    def removals() -> int:
        stats = client.info("commandstats")
        return sum(int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("unlink", "pttl"))

    BESIDE["uploads: ten million chunks"](client, f"{{{namespace}}}:snapshots:")
    before = removals()

    publish(store, 1)

    assert removals() - before < MAX_CHUNKS


def test_an_entry_that_names_a_committed_upload_removes_none_of_its_chunks(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    third = [publish(store, version) for version in (1, 2, 3)][-1]
    upload_named_as_committed(client, f"{{{namespace}}}:snapshots:")

    publish(store, 4)

    assert store.load(third) == bytes([3]) * 2500


def test_the_chunks_of_a_snapshot_whose_manifest_broke_are_removed(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    for version in (1, 2, 3):
        publish(store, version)
    flipped(client, f"{{{namespace}}}:snapshots:", "a:1")

    publish(store, 4)

    assert list(client.scan_iter(f"{{{namespace}}}:snapshots:chunk:a:1:*")) == []
    assert len(list(client.scan_iter(f"{{{namespace}}}:snapshots:chunk:*"))) == 9


def test_a_key_of_the_wrong_kind_is_put_aside_and_expires(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    listed(client, f"{{{namespace}}}:snapshots:index")

    publish(store, 1)

    assert client.lrange(f"{{{namespace}}}:snapshots:index:broken", 0, -1) == [b"a", b"list"]
    assert 0 < client.ttl(f"{{{namespace}}}:snapshots:index:broken") <= 86_400


def test_retention_goes_on_beside_junk(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=5000, max_manifests=4)
    client.zadd(f"{{{namespace}}}:snapshots:index", {f"junk-{i}": i for i in range(50)})
    client.zadd(f"{{{namespace}}}:snapshots:history", {f"junk-{i}": i for i in range(50)})

    manifests = [publish(store, version) for version in range(1, 10)]

    assert store.list() == tuple(manifests[-2:])
    assert client.zcard(f"{{{namespace}}}:snapshots:index") == 2
    assert client.zcard(f"{{{namespace}}}:snapshots:history") == 4
    assert len(list(client.scan_iter(f"{{{namespace}}}:snapshots:chunk:*"))) == 6


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        (lambda c, key: listed(c, key), "chunk 1 of 3: another kind of value, expected 1000 bytes"),
        (lambda c, key: c.set(key, b"x" * BIG), "chunk 1 of 3: at least 1001 bytes, expected 1000"),
        (lambda c, key: c.set(key, b""), "chunk 1 of 3: missing, though"),
    ],
    ids=["a list", "five megabytes", "empty"],
)
def test_a_broken_chunk_is_named(
    client: redis.Redis, namespace: str, store: SnapshotStore, junk: Callable[..., object], message: str
) -> None:
    manifest = publish(store, 1)
    junk(client, f"{{{namespace}}}:snapshots:chunk:{manifest.upload}:1")

    with pytest.raises(SnapshotError, match=message):
        store.load(manifest)


def test_a_manifest_that_lies_about_sizes_allocates_nothing(store: SnapshotStore) -> None:
    manifest = publish(store, 1)
    lying = replace(manifest, chunks=(Chunk(512 * 1024 * 1024, "0" * 64),) * MAX_CHUNKS)

    with pytest.raises(SnapshotError, match=f"chunk 0 of {MAX_CHUNKS}: 1000 bytes, expected 536870912"):
        store.load(lying)


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "metrics",
    [{"x": nested(17)}, {"x": nested(50_000)}, {"x": "y" * 2_000_000}, {"x": object()}, {"x": 10**400}],
    ids=["17 deep", "50,000 deep", "large", "no JSON", "10^400"],
)
def test_metrics_that_no_manifest_holds_are_left_out(store: SnapshotStore, metrics: dict[str, object]) -> None:
    assert publish(store, 1, metrics=metrics).metrics == {}
    assert store.current() == store.get("a", 1)


def test_times_that_no_manifest_holds_do_not_stop_a_publication(store: SnapshotStore) -> None:
    arrivals = ((-5, 1, 0, 0, 0), (10**30, 1, 0, 0, 0), (7, -1, 0, 0, 0), (7, 2, 0, -1, 0), (7, 3, 1, 2, 3))

    manifest = publish(store, 1, event_time_ms=10**17, feedback_arrivals=arrivals)

    assert manifest.event_time_ms is None
    assert manifest.feedback_arrivals == ((7, 3, 1, 2, 3),)
    assert store.current() == manifest


def test_positions_that_no_manifest_holds_are_named(store: SnapshotStore) -> None:
    with pytest.raises(SnapshotError, match=r"snapshot manifest: positions\[...\]\[...\]: expected `int` >= 0"):
        publish(store, 1, positions={"impressions": {"0": -1}})


def test_small_chunks_of_a_large_payload_are_made_larger(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, chunk_bytes=1)

    manifest = store.publish(bytes(10_000), lineage="a", version=1, schema_hash="h", step=1, created_ms=1)

    assert len(manifest.chunks) <= MAX_CHUNKS
    assert store.load(manifest) == bytes(10_000)
