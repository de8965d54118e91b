"""A store that keeps rows of items reads what one that does not reads, against a real server."""

import struct
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import redis

from feature_store.entities import ALWAYS, EntityRows, EntityStore
from feature_store.item_cache import ItemCache
from smes.errors import FeatureStoreUnavailable
from smes_io.clock import wall_clock_ms
from tests.feature_store.test_entities import SCHEMA

Caching = Callable[..., EntityStore]


@pytest.fixture
def caching(client: redis.Redis, namespace: str) -> Caching:
    def caching(most_bytes: int = 1_000_000, longest_s: float = 1e6, **options: object) -> EntityStore:
        cache = ItemCache(most_bytes, longest_s, **options)  # type: ignore[arg-type]
        return EntityStore(client, SCHEMA, namespace, cache=cache)

    return caching


@pytest.fixture
def plain(client: redis.Redis, namespace: str) -> EntityStore:
    return EntityStore(client, SCHEMA, namespace)


def put(store: EntityStore, items: list[int], author: int, time_ms: int | None = ALWAYS) -> None:
    store.put_many("item", np.array(items), {"author": np.full(len(items), author)}, time_ms)


def authors(rows: EntityRows) -> list[int]:
    found: list[int] = rows.ids[:, 7].tolist()
    return found


def same(got: EntityRows, expected: EntityRows) -> None:
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.numerics, expected.numerics)
    np.testing.assert_array_equal(got.items_known, expected.items_known)
    assert (got.user_known, got.problem) == (expected.user_known, expected.problem)


def keys_read(client: redis.Redis) -> int:
    stats = client.info("stats")
    return int(stats["keyspace_hits"]) + int(stats["keyspace_misses"])


def test_kept_rows_are_not_asked_for_again(caching: Caching, client: redis.Redis) -> None:
    store, items = caching(), np.arange(200)
    put(store, list(range(100)), 5)
    for _ in range(3):
        first = store.get(7, items)
    before, calls = keys_read(client), client.info("commandstats")["cmdstat_mget"]["calls"]

    again = store.get(7, items)

    same(again, first)
    assert authors(again) == [5] * 100 + [-(2**63)] * 100
    assert keys_read(client) - before == 2  # the mark and the user
    assert client.info("commandstats")["cmdstat_mget"]["calls"] - calls == 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_written_when_both_stores_read_the_same(
    seed: int, caching: Caching, plain: EntityStore, client: redis.Redis, namespace: str
) -> None:
    rng, now_ms = np.random.default_rng(seed), wall_clock_ms()
    store = caching(most_bytes=25 * (2 * 36 + 150))  # 25 items
    for step in range(250):
        kind = rng.integers(14)
        if kind == 0:
            put(plain, rng.choice(40, 3, replace=False).tolist(), step, now_ms + int(rng.integers(-9, 9)) * 1000)
        elif kind == 1:
            plain.put("user", 7, {"age": float(step)})
        elif kind == 2 and rng.random() < 0.2:
            plain.clear()
        elif kind == 3:
            key = f"{{{namespace}}}:features:item:{rng.integers(40)}"
            client.set(key, b"broken")
            put(plain, [99], step)  # with a mark, as whoever breaks a row through the store would leave one
        asked = [(7, rng.integers(0, 40, rng.integers(1, 12))) for _ in range(rng.integers(1, 3))]
        at_ms = now_ms + int(rng.integers(-9, 9)) * 1000
        for got, expected in zip(store.get_many(asked, at_ms), plain.get_many(asked, at_ms), strict=True):
            same(got, expected)


def test_what_was_written_before_a_read_began_is_read(caching: Caching, plain: EntityStore) -> None:
    store, items = caching(), np.arange(20)
    written, failed, ended = [0], [], threading.Event()
    put(plain, items.tolist(), 0)

    def reads() -> None:
        while not ended.is_set():
            least = written[0]
            found = authors(store.get(7, items))
            if min(found) < least:
                failed.append((least, found))

    readers = [threading.Thread(target=reads) for _ in range(3)]
    for reader in readers:
        reader.start()
    for value in range(1, 60):
        put(plain, items.tolist(), value)
        written[0] = value
        time.sleep(0.01 if value % 3 else 0)  # now and then long enough for rows to be kept
    ended.set()
    for reader in readers:
        reader.join()
    assert failed == []


def test_who_writes_without_a_mark_is_noticed_in_the_end(caching: Caching, client: redis.Redis, namespace: str) -> None:
    now_s = [0.0]
    store = caching(longest_s=60.0, monotonic_s=lambda: now_s[0])
    put(store, [1], 5)
    for _ in range(3):
        store.get(7, np.array([1]))
    key = f"{{{namespace}}}:features:item:1"
    value = client.get(key)
    assert isinstance(value, bytes)
    client.set(key, value[:-12] + struct.pack("<q", 6) + value[-4:])

    kept = authors(store.get(7, np.array([1])))
    now_s[0] = 61.0

    assert (kept, authors(store.get(7, np.array([1])))) == ([5], [6])


def test_a_removal_that_broke_off_is_noticed(
    caching: Caching, plain: EntityStore, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, items = caching(), np.array([1])
    put(store, [1], 5)
    for _ in range(3):
        store.get(7, items)
    unlink = client.unlink

    def broken_off(*keys: bytes) -> int:
        unlink(*keys)
        raise redis.ConnectionError("lost after the rows were removed")

    monkeypatch.setattr(client, "unlink", broken_off)
    with pytest.raises(FeatureStoreUnavailable, match="while features were removed"):
        plain.clear()

    assert authors(store.get(7, items)) == [-(2**63)]
