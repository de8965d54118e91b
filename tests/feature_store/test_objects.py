"""Chunks in an object store, by fsspec: a folder, and objects in memory; what is current stays in a real Redis."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import redis
from fsspec.implementations.memory import MemoryFileSystem

from feature_store.config import ChunksConfig, SnapshotStoreConfig
from feature_store.manifest import Manifest, SnapshotKeys
from feature_store.objects import Objects
from feature_store.pieces import Payload
from feature_store.publication import Publication
from feature_store.snapshots import SnapshotStore
from smes.errors import FeatureStoreError, FeatureStoreUnavailable, SnapshotDamaged, SnapshotError, SnapshotNotFound
from tests.feature_store.stores import make_store

FULL, DELTA = 4000, 1500
"""Bytes of the payloads, in chunks of 1,000."""


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> str:
    return f"file://{tmp_path}/bucket" if request.param == "file" else f"memory://{namespace}"


@pytest.fixture
def store(client: redis.Redis, namespace: str, url: str) -> SnapshotStore:
    return open_store(client, namespace, url)


def open_store(client: redis.Redis, namespace: str, url: str, **config: int) -> SnapshotStore:
    sizes = SnapshotStoreConfig(**{"chunk_bytes": 1000, **config})  # type: ignore[arg-type] # all are numbers
    return SnapshotStore(client, namespace, sizes, objects=Objects.of(ChunksConfig(url), namespace))


def publish(store: SnapshotStore, version: int, *, full: bool = False, lineage: str = "a") -> Manifest:
    return store.publish(
        bytes([version]) * (FULL if full else DELTA),
        lineage=lineage,
        version=version,
        schema_hash="0123456789abcdef",
        step=version,
        created_ms=1_700_000_000_000,
        applies_to=None if full else {version - 1},
    )


def objects_at(url: str) -> list[str]:
    """The names of all objects at a URL, without the namespace's folder."""
    fs, root = fsspec.url_to_fs(url)
    paths = fs.find(root) if fs.exists(root) else []
    return sorted("/".join(path.split("/")[-2:]) for path in paths)


def names_of(namespace: str, *manifests: Manifest) -> list[str]:
    return sorted(name for manifest in manifests for name in SnapshotKeys(namespace).chunks(manifest).objects)


def chunk_keys(client: redis.Redis, namespace: str) -> list[Any]:
    return list(client.scan_iter(f"{{{namespace}}}:snapshots:chunk:*"))


def test_chunks_are_objects_and_go_with_their_chain(
    client: redis.Redis, namespace: str, url: str, store: SnapshotStore
) -> None:
    first = publish(store, 1, full=True)
    second = publish(store, 2)
    base = store.publish_base(Payload(FULL, lambda: iter([bytes([2]) * FULL])), second)

    for manifest in (first, second, base):
        assert manifest.chunks_in == "objects"
        assert store.load(manifest) == bytes([manifest.version]) * manifest.total_bytes
    assert store.chain(publish(store, 3)) == (base, store.get("a", 3))
    assert objects_at(url) == names_of(namespace, first, second, base, store.get("a", 3))
    assert chunk_keys(client, namespace) == []

    small = open_store(client, namespace, url, retain_bytes=1, min_retained=1)
    last = publish(small, 4, full=True)

    kept = store.list()
    assert (kept[-1], first in kept) == (last, False)
    assert objects_at(url) == names_of(namespace, *kept, *store.bases(kept).values())
    with pytest.raises(SnapshotNotFound, match="retention removed it"):
        store.load(first)


@pytest.mark.parametrize("change", ["gone", "shorter", "longer", "other"])
def test_a_damaged_object_is_named(url: str, store: SnapshotStore, change: str) -> None:
    manifest = publish(store, 1, full=True)
    fs, root = fsspec.url_to_fs(url)
    path = next(path for path in fs.find(root) if path.endswith("/0-2"))
    if change == "gone":
        fs.rm_file(path)
    else:
        fs.pipe_file(path, {"shorter": bytes([1]) * 999, "longer": bytes([1]) * 1001, "other": bytes(1000)}[change])

    expected = {
        "gone": "missing, though the snapshot is listed",
        "shorter": "999 bytes, expected 1000",
        "longer": "at least 1001 bytes, expected 1000",
        "other": "SHA-256",
    }
    with pytest.raises(SnapshotDamaged, match=f"chunk 2 of 4: {expected[change]}"):
        store.load(manifest)
    if change == "gone":
        with pytest.raises(SnapshotError, match="1 of its chunks"):
            store.operator.pin(1, "a", by="me")


def test_what_was_left_behind_is_removed_and_nothing_else(client: redis.Redis, namespace: str, url: str) -> None:
    """Of an upload that broke off, of a removal that broke off, and junk that names what is outside."""
    kept = publish(open_store(client, namespace, url), 1, full=True)
    sizes, payload = [1000] * 4, Payload.of(bytes(FULL))
    objects = Objects(url, namespace)
    died = Publication(client, SnapshotKeys(namespace), 600, objects=objects)
    died.upload("a:2", "a:2:0123abcd", payload, sizes)
    died.upload("a:2", "a:2:0123abcd/1", payload, sizes)
    running = Publication(client, SnapshotKeys(namespace), 600, objects=objects)
    running.upload("b:9", "b:9:0123abcd", payload, sizes)  # of another lineage
    objects.write("7-0123abcd-of-a/0-0", b"of a version that is not listed any more")
    neighbour = Objects(url, "another")
    neighbour.write("7-0123abcd-of-a/0-0", b"of another namespace")
    entry = b'{"lineage":"a","chunks":1,"begun_s":1,"objects":true}'
    client.hset(f"{{{namespace}}}:snapshots:uploads", "a:2:0123abcd/../../another/7-0123abcd-of-a/0", entry)
    client.hset(f"{{{namespace}}}:snapshots:uploads", "..:..:/x", entry)

    second = publish(open_store(client, namespace, url), 2, full=True)

    left = [*names_of(namespace, kept, second), *(f"9-0123abcd-of-b/0-{i}" for i in range(4)), "7-0123abcd-of-a/0-0"]
    assert objects_at(url) == sorted(left)
    assert neighbour.read("7-0123abcd-of-a/0-0", 100) == b"of another namespace"


def test_a_store_that_moves_its_chunks_keeps_what_it_has(client: redis.Redis, namespace: str, url: str) -> None:
    before, after = make_store(client, namespace), open_store(client, namespace, url)
    in_redis, moved = publish(before, 1, full=True), publish(after, 2)

    assert after.load(in_redis) + after.load(moved) == bytes([1]) * FULL + bytes([2]) * DELTA
    assert after.chain(moved) == (in_redis, moved)
    with pytest.raises(SnapshotError, match=r"its chunks are objects, expected feature_store.chunks.url to say where"):
        before.load(moved)
    small = open_store(client, namespace, url, retain_bytes=1, min_retained=1)
    publish(small, 3, full=True)
    publish(small, 4, full=True)
    assert chunk_keys(client, namespace) == []


def test_an_upload_that_was_taken_for_abandoned_leaves_nothing(
    client: redis.Redis, namespace: str, url: str, store: SnapshotStore
) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(3000)
        client.delete(f"{{{namespace}}}:snapshots:uploads")  # by another publisher, which saw no object of it yet
        yield bytes(1000)

    with pytest.raises(SnapshotError, match="another publisher of the lineage is running"):
        store.publish(
            Payload(FULL, pieces), lineage="a", version=1, schema_hash="0" * 16, step=1, created_ms=1_700_000_000_000
        )

    assert objects_at(url) == []


class Hanging(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Objects in memory that answer when they are let go."""

    go_on = threading.Event()
    protocol = "hanging"
    cachable = False

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        assert self.go_on.wait(20)
        return super().cat_file(path, start=start, end=end, **options)


def test_waits_are_bounded_and_errors_are_of_the_store(client: redis.Redis, namespace: str, tmp_path: Path) -> None:
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    Hanging.go_on.clear()
    objects = Objects(f"hanging://{namespace}", namespace, timeout_s=0.1)
    store = SnapshotStore(client, namespace, objects=objects)
    manifest = publish(store, 1, full=True)
    begun_s = time.monotonic()
    with pytest.raises(FeatureStoreUnavailable, match=r"gave no answer within 0\.1 s while object 1-"):
        store.load(manifest)
    assert time.monotonic() - begun_s < 5
    Hanging.go_on.set()

    (tmp_path / "file").write_bytes(b"")
    broken = open_store(client, f"{namespace}-2", f"file://{tmp_path}/file")
    with pytest.raises(FeatureStoreError, match=r"failed while object 1-.*Not a directory"):
        publish(broken, 1, full=True)
    assert broken.list() == ()
    assert not client.hlen(f"{{{namespace}-2}}:snapshots:uploads")


def test_the_time_limit_is_not_of_all_that_is_removed(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(f"memory://{namespace}", namespace, timeout_s=0.4)
    names = [f"{version}-0-of-a/0-0" for version in range(60)]
    for name in names:
        objects.write(name, b"x")
    removed_at_once = MemoryFileSystem.rm_file

    def slow(self: MemoryFileSystem, path: str) -> None:
        time.sleep(0.01)
        removed_at_once(self, path)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", slow)
    objects.remove(names)
    assert objects.folders() == set()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"url": "nowhere"}, "ChunksConfig.url: 'nowhere', expected redis, or a URL such as s3://bucket/folder"),
        ({"url": "nowhere://x"}, "feature_store.chunks: url 'nowhere://x': Protocol not known: nowhere"),
        ({"url": "gs://bucket", "options": {}}, "feature_store.chunks: url 'gs://bucket': .*gcsfs"),
    ],
)
def test_a_place_that_cannot_be_is_refused(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Objects.of(ChunksConfig(**config), "smes")
