"""More versions than are read at once, or kept: none is taken for broken, and none is left behind in the store."""

import pytest
import redis

from feature_store.snapshots import SnapshotStore
from tests.feature_store.stores import make_store
from tests.feature_store.test_chains import base_of, chunk_keys, publish, way


def test_manifests_that_are_too_many_to_be_read_at_once_are_not_taken_for_broken(
    client: redis.Redis, namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = make_store(client, namespace)
    publish(before, 1, full=True)
    for version in range(2, 8):
        publish(before, version)
    third_bytes = client.hstrlen(f"{{{namespace}}}:snapshots:manifests", "a:3")
    monkeypatch.setattr("feature_store.reading._MAX_READ_BYTES", 4 * third_bytes)
    monkeypatch.setattr("feature_store.retention._READ_AT_ONCE", 2)

    after = make_store(client, namespace)  # knows nothing yet
    newest = publish(after, 8)

    assert client.zrange(f"{{{namespace}}}:snapshots:index", 0, -1) == [b"a:%d" % v for v in range(1, 9)]
    assert caplog.messages == []
    monkeypatch.undo()
    assert way(after, newest) == [("full", 1), *(("delta", v) for v in range(2, 9))]


def test_the_newest_base_is_found_among_more_manifests_than_are_read_at_once(
    client: redis.Redis, namespace: str, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1, full=True)
    for version in range(2, 8):
        manifest = publish(store, version)
    store.publish_base(base_of(manifest), manifest)
    newest = publish(store, 8)
    monkeypatch.setattr("feature_store.reading._SLICE", 1)
    manifest_bytes = client.hstrlen(f"{{{namespace}}}:snapshots:manifests", "a:8")
    monkeypatch.setattr("feature_store.reading._MAX_READ_BYTES", 3 * manifest_bytes)

    assert way(store, newest) == [("full", 7), ("delta", 8)]


def test_retention_bounds_the_number_of_versions_too(
    client: redis.Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.retention._MOST_VERSIONS", 12)
    store = make_store(client, namespace)
    for version in range(1, 31):
        manifest = publish(store, version, full=version == 1)
        if version % 5 == 0:
            store.publish_base(base_of(manifest), manifest)

    assert [m.version for m in store.list()] == list(range(20, 31))
    assert len(chunk_keys(client, namespace)) == 11 * 2 + 3 * 4
    assert way(store, manifest) == [("full", 30)]
