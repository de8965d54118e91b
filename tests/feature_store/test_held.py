"""Versions that are published aside: kept, listed and loadable, but neither current nor announced."""

import pytest
import redis

from feature_store.manifest import Manifest
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.errors import SnapshotGap, SnapshotNotFound, SnapshotStale
from tests.feature_store.stores import make_store


def publish(store: SnapshotStore, version: int, *, after: set[int] | None = None, held: str | None = None) -> Manifest:
    return store.publish(
        f"payload {version} {held}".encode(),
        lineage="a",
        version=version,
        schema_hash="s",
        step=version,
        created_ms=0,
        applies_to=after,
        held=held,
    )


def names(manifests: tuple[Manifest, ...]) -> list[int]:
    return [manifest.version for manifest in manifests]


def test_a_held_version_is_listed_with_its_reason_and_nothing_else_changes(
    store: SnapshotStore, client: redis.Redis, namespace: str
) -> None:
    publish(store, 1)
    watcher = SnapshotWatcher(client, namespace)
    assert watcher.wait(10)

    publish(store, 2, after={1}, held="click: NE 0.4 worse")

    assert not watcher.wait(0.2)
    assert store.pointer() == "a:1"
    assert names(store.list()) == [1]
    assert [(m.version, m.parent, m.held) for m in store.held()] == [(2, 1, "click: NE 0.4 worse")]
    assert store.get("a", 2).held == "click: NE 0.4 worse"
    watcher.close()


def test_a_held_version_can_be_loaded(store: SnapshotStore) -> None:
    publish(store, 1)
    held = publish(store, 2, after={1}, held="why")

    assert [(m.version, store.load(m)) for m in store.chain(held)] == [(1, b"payload 1 None"), (2, b"payload 2 why")]


def test_later_deltas_lead_on_from_what_is_current(store: SnapshotStore) -> None:
    publish(store, 1)
    publish(store, 2, after={1}, held="why")

    assert publish(store, 3, after={1}).parent == 1
    with pytest.raises(SnapshotGap, match="snapshot a:4: a:3 is current, expected version 2, to which it applies"):
        publish(store, 4, after={2})


def test_the_newest_held_versions_are_kept(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, max_held=2)
    publish(store, 1)
    before = len(client.keys(f"*{namespace}*chunk*"))

    for version in (2, 3, 4):
        publish(store, version, after={1}, held="why")

    assert names(store.held()) == [3, 4]
    assert len(client.keys(f"*{namespace}*chunk*")) == before + 2
    with pytest.raises(SnapshotNotFound):
        store.get("a", 2)


def test_a_version_that_is_published_again_takes_the_place_of_the_held_one(
    store: SnapshotStore, client: redis.Redis, namespace: str
) -> None:
    publish(store, 1)
    publish(store, 2, after={1}, held="why")
    publish(store, 2, after={1}, held="still")
    assert [(m.version, m.held) for m in store.held()] == [(2, "still")]

    current = publish(store, 2, after={1})

    assert (store.pointer(), store.held(), store.load(current)) == ("a:2", (), b"payload 2 None")
    assert len(client.keys(f"*{namespace}*chunk*")) == 2


def test_what_is_current_cannot_be_held(store: SnapshotStore) -> None:
    publish(store, 2)

    with pytest.raises(SnapshotStale):
        publish(store, 2, held="why")
    with pytest.raises(SnapshotStale):
        publish(store, 1, held="why")
    with pytest.raises(ValueError, match="held: empty"):
        publish(store, 3, held="")


def test_a_long_reason_is_cut(store: SnapshotStore) -> None:
    publish(store, 1)

    assert publish(store, 2, held="x" * 5000).held == "x" * 1000
