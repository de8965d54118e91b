"""Rows by time: whatever the order of the writes, a look-up finds what held at its time, where it is kept."""

from collections import defaultdict

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.entities import ALWAYS, EntityStore
from feature_store.entity_values import columns_of
from smes.hashing import encode_id
from smes.schema import MISSING, Feature, Schema, Task

SCHEMA = Schema(
    "versions",
    (Task("click"),),
    (
        Feature("liked", "sequence", source="user", query="item_id", vocabulary="item_id", max_length=2),
        Feature("stars", "sequence", source="user", accompanies="liked", max_length=2),
        Feature("joined", "numeric", source="user", elapsed=True),
        Feature("price", "numeric", source="item"),
    ),
)
WIDER = Schema("wider", SCHEMA.tasks, (*SCHEMA.features, Feature("stock", "numeric", source="item")))
NOW_MS = 1_800_000_000_000
TIMES = st.one_of(st.just(ALWAYS), st.integers(NOW_MS - 6, NOW_MS))
WRITES = st.lists(st.tuples(st.integers(0, 2), TIMES, st.integers(0, 1000), st.booleans()), max_size=30)


def as_of(store: EntityStore, ids: list[int], times_ms: list[int]) -> tuple[list[float], list[bool], list[bool]]:
    """Prices of items, which are known, and which are so only later."""
    schema = store._schema
    out_ids = np.full((len(ids), schema.id_width), MISSING)
    numerics = np.full((len(ids), schema.num_numerics), np.nan, np.float32)
    found = store.as_of("item", np.array(ids, np.int64), np.array(times_ms, np.int64), out_ids, numerics)
    price = [f.name for f in schema.numeric_features].index("price")
    return numerics[:, price].tolist(), found.known.tolist(), found.later.tolist()


@settings(max_examples=40, deadline=None)
@given(writes=WRITES, keep=st.integers(1, 4), looked_up=st.lists(st.tuples(st.integers(0, 3), TIMES), max_size=20))
def test_look_ups_find_what_held_at_their_time(
    redis_url: str, writes: list[tuple[int, int, int, bool]], keep: int, looked_up: list[tuple[int, int]]
) -> None:
    """Against a dictionary of times: writes in any order, one by one and together, under two schemas."""
    with redis.Redis.from_url(redis_url) as client:
        stores = [
            EntityStore(client, schema, "test-versions", keep=keep, now_ms=lambda: NOW_MS) for schema in (SCHEMA, WIDER)
        ]
        stores[0].clear()
        expected: dict[int, dict[int, int]] = defaultdict(dict)
        for item, time_ms, price, wider in writes:
            prices = {"price": np.array([price, price])}
            dropped = stores[wider].put_many("item", np.array([item, item]), prices, np.full(2, time_ms))
            versions = {**expected[item], time_ms: price}
            kept = sorted(versions, reverse=True)[:keep]
            assert dropped == (0 if time_ms in kept else 2)
            expected[item] = {kept_ms: versions[kept_ms] for kept_ms in kept}

        for item, versions in expected.items():
            stored = stores[0].versions("item", item)
            assert [(v.time_ms, v.values["price"]) for v in stored] == sorted(versions.items(), reverse=True)
        for store in stores:
            ids, times_ms = [i for i, _ in looked_up], [time_ms for _, time_ms in looked_up]
            prices_found, known, later = as_of(store, ids, times_ms)
            for n, (item, time_ms) in enumerate(looked_up):
                held = [kept_ms for kept_ms in expected[item] if kept_ms <= time_ms]
                assert known[n] == bool(held)
                assert later[n] == (bool(expected[item]) and not held)
                if held:
                    assert prices_found[n] == expected[item][max(held)]
                else:
                    assert np.isnan(prices_found[n])
            now = store.get(1, np.array([0, 1, 2, 3]), now_ms=NOW_MS - 3)
            assert now.items_known.tolist() == as_of(store, [0, 1, 2, 3], [NOW_MS - 3] * 4)[1]


def test_more_entities_than_one_command_reads_have_their_own_times(client: redis.Redis, namespace: str) -> None:
    """2,500 items with two versions each, every one looked up at three times."""
    store = EntityStore(client, SCHEMA, namespace, now_ms=lambda: NOW_MS)
    ids = np.arange(2500)
    for put_ms, factor in ((10, 1.0), (5, 2.0)):
        assert store.put_many("item", ids, {"price": ids * factor}, NOW_MS - put_ms) == 0

    order = np.random.default_rng(0).permutation(np.tile(ids, 3))
    age_ms = np.random.default_rng(1).permutation(np.repeat([12, 7, 2], 2500))
    prices, known, later = as_of(store, order.tolist(), (NOW_MS - age_ms).tolist())

    np.testing.assert_array_equal(prices, np.select([age_ms == 7, age_ms == 2], [order, order * 2.0], np.nan))
    assert (np.array(known) == (age_ms < 12)).all()
    assert (np.array(later) == (age_ms == 12)).all()


def test_plain_values_become_columns_and_faults_are_named(client: redis.Redis, namespace: str) -> None:
    store = EntityStore(client, SCHEMA, namespace)
    store.put("user", "ann", {"liked": [5, "six", 7], "stars": [1, 2, 3], "joined": 1_700_000_000}, time_ms=ALWAYS)
    store.put("user", "ann", {"joined": "", "liked": [""]})

    (now, before) = store.versions("user", encode_id("ann"))

    assert now.values == {"liked": [], "stars": [], "joined": None}
    assert before.values == {"liked": [5, encode_id("six")], "stars": [1, 2], "joined": 1_700_000_000}

    wrong: tuple[tuple[list[dict[str, object]], str], ...] = (
        ([{"joined": 1}, {"joined": "soon"}], "row 1: joined: 'soon', expected a number"),
        ([{"joined": float("nan")}], "joined: nan, expected a finite number"),
        ([{"joined": True}], "joined: True, expected a number"),
        ([{"liked": 5}], "liked: 5, expected a list of ids"),
        ([{"liked": [2.5e300]}], r"liked: id: 2\.5e\+300"),
        ([{"price": 1}], "price: no user feature, expected one of joined, liked, stars"),
    )
    for rows, message in wrong:
        with pytest.raises(ValueError, match=message):
            columns_of(SCHEMA, "user", rows)
    with pytest.raises(ValueError, match="user_id: '', expected an integer or a text that is not empty"):
        store.put("user", "", {"joined": 1})
    with pytest.raises(ValueError, match="row 0: a sequence of another length than the one that it accompanies"):
        store.put("user", 1, {"liked": [1, 2], "stars": [1]})


@pytest.mark.parametrize("time_ms", [1_700_000_000, -1, NOW_MS + 86_400_001], ids=["seconds", "negative", "future"])
def test_a_time_that_is_none_is_refused(client: redis.Redis, namespace: str, time_ms: int) -> None:
    store = EntityStore(client, SCHEMA, namespace, now_ms=lambda: NOW_MS)

    with pytest.raises(ValueError, match=f"time_ms: {time_ms}, expected 0 or Unix milliseconds from 946684800000"):
        store.put("item", 1, {"price": 2.0}, time_ms)

    store.put("item", 1, {"price": 2.0}, NOW_MS + 1000)
    assert not store.get(1, np.array([1])).items_known[0]  # not yet
