"""Entity features against a real server: what is written is what the matrices get, in one round trip."""

import re
import struct
import time

import numpy as np
import pytest
import redis

from feature_store.entities import EntityStore
from feature_store.entity_layout import Layout
from smes.errors import FeatureStoreError, FeatureStoreUnavailable
from smes.schema import MISSING, Feature, Schema, Task
from smes_io.redis_client import open_client
from tests.running import valkey_server

SCHEMA = Schema(
    name="test",
    tasks=(Task("click"),),
    features=(
        Feature("age", "numeric", source="user"),
        Feature("hour", "id"),
        Feature("tags", "bag", source="item", max_length=3),
        Feature("country", "id", source="user"),
        Feature("length", "numeric", source="item"),
        Feature("battery", "numeric"),
        Feature("author", "id", source="item"),
    ),
)
_ITEM_LAYOUT = Layout.of(SCHEMA, "item").id


def _version(row: bytes, layout_id: bytes = _ITEM_LAYOUT) -> bytes:
    """A stored value with one version."""
    return struct.pack("<q8sI", 0, layout_id, len(row)) + row


# ids: user_id, item_id, hour, tags ×3, country, author; numerics: age, length, battery


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> EntityStore:
    store = EntityStore(client, SCHEMA, namespace)
    store.put_many(
        "user",
        np.array([7, -8]),
        {"age": np.array([31.5, np.nan], np.float32), "country": np.array([49, MISSING])},
    )
    store.put_many(
        "item",
        np.array([100, 2**62]),
        {
            "tags": np.array([[1, 2, MISSING], [MISSING, MISSING, MISSING]]),
            "length": np.array([12.25, 0.0], np.float32),
            "author": np.array([-5, 6]),
        },
    )
    return store


def test_rows_are_what_was_written(store: EntityStore) -> None:
    rows = store.get(7, np.array([2**62, 999, 100]))
    gone = MISSING

    np.testing.assert_array_equal(
        rows.ids,
        [
            [7, 2**62, gone, gone, gone, gone, 49, 6],
            [7, 999, gone, gone, gone, gone, 49, gone],
            [7, 100, gone, 1, 2, gone, 49, -5],
        ],
    )

    nan = np.nan

    np.testing.assert_array_equal(rows.numerics, np.array([[31.5, 0, nan], [31.5, nan, nan], [31.5, 12.25, nan]], "f4"))
    assert rows.ids.dtype == np.int64
    assert rows.numerics.dtype == np.float32
    assert rows.user_known
    assert rows.items_known.tolist() == [True, False, True]


def test_unknown_entities_are_missing_values(store: EntityStore) -> None:
    rows = store.get(12345, np.array([1]))

    assert not rows.user_known
    assert not rows.items_known.any()
    np.testing.assert_array_equal(rows.ids, [[12345, 1] + [MISSING] * 6])
    assert np.isnan(rows.numerics).all()


def test_an_empty_store_knows_nothing(client: redis.Redis, namespace: str) -> None:
    rows = EntityStore(client, SCHEMA, namespace).get(1, np.array([2, 3]))

    assert (rows.ids[:, 2:] == MISSING).all()


def test_a_second_write_replaces_the_whole_entity(store: EntityStore) -> None:
    store.put_many("user", np.array([7]), {"country": np.array([1])})

    rows = store.get(7, np.array([100]))

    assert rows.ids[0, 6] == 1
    assert np.isnan(rows.numerics[0, 0])


def test_a_read_is_one_round_trip(store: EntityStore, client: redis.Redis) -> None:
    def commands() -> int:
        stats = client.info("commandstats")
        return sum(entry["calls"] for name, entry in stats.items() if name != "cmdstat_info")

    before = commands()
    store.get(7, np.arange(200))

    assert commands() - before == 1


def test_several_requests_in_one_round_trip_get_what_each_gets_alone(store: EntityStore, client: redis.Redis) -> None:
    asked = [(7, np.array([100, 999])), (5, np.array([2**62])), (-8, np.array([100, 2**62, 100])), (7, np.array([1]))]
    alone = [store.get(user, items) for user, items in asked]
    before = client.info("commandstats")["cmdstat_mget"]["calls"]

    together = store.get_many(asked)

    assert client.info("commandstats")["cmdstat_mget"]["calls"] == before + 1
    for got, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got.ids, expected.ids)
        np.testing.assert_array_equal(got.numerics, expected.numerics)
        np.testing.assert_array_equal(got.items_known, expected.items_known)
        assert got.user_known == expected.user_known


def test_rows_of_another_schema_are_read_by_the_names_of_their_columns(
    store: EntityStore, client: redis.Redis, namespace: str
) -> None:
    other = Schema(
        name="other",
        tasks=SCHEMA.tasks,
        features=(
            Feature("author", "id", source="item"),
            Feature("tags", "bag", source="item", max_length=5),
            Feature("weight", "numeric", source="item"),
            Feature("nation", "id", source="user"),  # was country
            Feature("age", "id", source="user"),  # was a number
        ),
    )
    stranger = EntityStore(client, other, namespace, renamed={"nation": "country"})

    rows = stranger.get(7, np.array([100, 5]))

    m = MISSING
    # ids: user_id, item_id, author, tags ×5, nation, age
    assert rows.ids.tolist() == [[7, 100, -5, 1, 2, m, m, m, 49, m], [7, 5, m, m, m, m, m, m, 49, m]]
    assert np.isnan(rows.numerics).all()
    assert rows.problem is None

    stranger.put("item", 100, {"tags": [8, 9, 10, 11], "weight": 2.0})

    assert store.get(7, np.array([100])).ids.tolist() == [[7, 100, m, 8, 9, 10, 49, m]]
    assert store.holds_any()
    assert stranger.clear() == 4
    assert not store.holds_any()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"short", "5 bytes, expected versions of a row"),
        (b"x" * 1_000_000, "1000000 bytes, expected versions of a row"),
        (b"", "0 bytes, expected versions of a row"),
        (_version(bytes(35)), "a row of another length, expected 36 bytes"),
        (_version(bytes(36), b"whatever"), "a row of layout 7768617465766572, which .*:layouts does not describe"),
        (_version(bytes(32) + np.float32(np.inf).tobytes()), "an infinite number, expected numbers"),
    ],
    ids=["short", "long", "empty", "row", "layout", "infinite"],
)
def test_a_broken_value_is_missing_and_named_and_the_others_are_read(
    store: EntityStore, client: redis.Redis, namespace: str, value: bytes, message: str
) -> None:
    client.set(f"{{{namespace}}}:features:item:100", value)

    rows = store.get(7, np.array([100, 2**62]))

    assert rows.problem is not None
    assert re.fullmatch(f"Redis key {{{namespace}}}:features:item:100: {message}", rows.problem)
    assert store.damage.count == 1
    assert np.isnan(rows.numerics[0, 1])
    np.testing.assert_array_equal(rows.numerics[1], np.array([31.5, 0, np.nan], "f4"))
    assert rows.ids[1].tolist() == [7, 2**62, MISSING, MISSING, MISSING, MISSING, 49, 6]
    assert rows.user_known
    assert bool(rows.items_known[1])
    assert store.get(7, np.array([2**62])).problem is None


def test_a_value_of_another_kind_is_missing(store: EntityStore, client: redis.Redis, namespace: str) -> None:
    client.delete(f"{{{namespace}}}:features:item:100")
    client.rpush(f"{{{namespace}}}:features:item:100", "a list")

    assert store.get(7, np.array([100, 2**62])).items_known.tolist() == [False, True]


@pytest.mark.parametrize("junk", [b"{}", b"x" * 2_000_000, b'{"columns": [["age", "numeric", 7]]}', None])
def test_a_junk_layout_is_named_and_its_rows_are_missing(
    store: EntityStore, client: redis.Redis, namespace: str, junk: bytes | None
) -> None:
    key = f"{{{namespace}}}:features:layouts"
    other = Schema("other", SCHEMA.tasks, (Feature("age", "numeric", source="user"),))
    if junk is None:
        client.set(key, "no hash")
        with pytest.raises(FeatureStoreError, match=r"refused while .* WRONGTYPE"):
            store.put("user", 1, {"age": 3})
        with pytest.raises(FeatureStoreError, match="refused while the layouts of features were read"):
            EntityStore(client, other, namespace).get(7, np.array([100]))
        return
    for layout in client.hkeys(key):
        client.hset(key, layout, junk)
    reader = EntityStore(client, other, namespace)

    assert not reader.get(7, np.array([100])).user_known
    assert reader.damage.count == 2
    assert store.get(7, np.array([100])).user_known  # it knows its own layouts


def test_a_schema_without_entity_features_has_nothing_to_miss(client: redis.Redis, namespace: str) -> None:
    bare = EntityStore(client, Schema(name="bare", tasks=(Task("click"),)), namespace)
    bare.put_many("item", np.array([1, 2]), {})
    rows = bare.get(5, np.array([1, 9]))

    np.testing.assert_array_equal(rows.ids, [[5, 1], [5, 9]])
    assert rows.numerics.shape == (2, 0)
    assert rows.user_known
    assert rows.items_known.all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"hour": np.array([1])}, "column 'hour': expected one of"),
        ({"user_id": np.array([1])}, "column 'user_id'"),
        ({"country": np.array([1.0])}, "column 'country': float64"),
        ({"country": np.array([1, 2])}, r"\[2\], expected int64 \[1\]"),
        ({"age": np.array(["x"])}, "column 'age'"),
    ],
)
def test_a_wrong_column_is_refused(store: EntityStore, columns: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store.put_many("user", np.array([1]), columns)


def test_a_bag_of_another_length_is_refused(store: EntityStore) -> None:
    with pytest.raises(ValueError, match=r"column 'tags': int64 \[1, 2\], expected int64 \[1, 3\]"):
        store.put_many("item", np.array([1]), {"tags": np.array([[1, 2]])})


IDS = np.arange(40_000)


def load_many(store: EntityStore) -> None:
    columns: dict[str, np.ndarray] = {
        "author": IDS * 3,
        "length": IDS.astype(np.float32),
        "tags": np.stack([IDS, IDS, IDS], axis=1),
    }
    store.put_many("item", IDS, columns)


def test_a_bulk_load_reaches_its_rate(client: redis.Redis, namespace: str) -> None:
    store = EntityStore(client, SCHEMA, namespace)

    started_s = time.process_time()  # of this process alone, whatever else the machine does
    load_many(store)
    seconds = time.process_time() - started_s

    assert len(IDS) / seconds > 20_000


def test_more_entities_than_fit_into_one_command_are_written_and_removed(client: redis.Redis, namespace: str) -> None:
    store = EntityStore(client, SCHEMA, namespace)

    load_many(store)
    rows = store.get(0, IDS[::1000])
    removed = store.clear()

    np.testing.assert_array_equal(rows.ids[:, 7], IDS[::1000] * 3)
    assert removed == 40_000


def test_redis_away_is_a_clear_error() -> None:
    with valkey_server() as server:
        store = EntityStore(open_client(server.connection_url, 0.5), SCHEMA)
        store.get(1, np.array([1]))

    with pytest.raises(FeatureStoreUnavailable, match="gave no answer while features were read"):
        store.get(1, np.array([1]))
