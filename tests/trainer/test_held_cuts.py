"""Cuts that are held back, in a real Redis: kept aside, not served, and what they changed is in the next one served."""

from dataclasses import replace

import numpy as np
import pytest
import redis

from feature_store.config import SnapshotStoreConfig
from feature_store.snapshots import SnapshotStore
from smes.schema import Schema, Task
from tests.running import until
from tests.trainer.small_table import NOW_MS, Rows, SmallTable, assert_rows, served
from trainer.cuts import Cut
from trainer.publisher import Publisher

SCHEMA = Schema("published", tasks=(Task("click"),))


def make_publisher(store: SnapshotStore, lineage: str = "line") -> Publisher:
    return Publisher(store, SCHEMA, {"ranker": "none"}, lineage, now_ms=lambda: NOW_MS)


def asked_and_answered(publisher: Publisher) -> None:
    """Have it ask whether a held version is in service, and wait until it has."""
    publisher.look_for_promoted()
    until(lambda: not publisher._is_asked, "asked")
    publisher.look_for_promoted()  # one question after the other: the first is answered when the second is taken up
    until(lambda: not publisher._is_asked, "asked again")


def offer(table: SmallTable, publisher: Publisher, held: str | None = None) -> Rows:
    """Change the table and offer its cut; the rows at this version, when it is in the store."""
    table.change()
    before = publisher.published + publisher.held
    cut: Cut = table.cut(full=publisher.wants_full, base=held is None and publisher.wants_base)
    publisher.offer(replace(cut, held=held))
    until(lambda: publisher.published + publisher.held > before, f"version {table.step} in the store")
    return dict(table.rows)


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    return SnapshotStore(client, namespace, SnapshotStoreConfig(chunk_bytes=1000, max_chain_length=6))


def version_in_service(store: SnapshotStore) -> int | None:
    manifest = store.current()
    return manifest.version if manifest else None


@pytest.mark.parametrize("seed", range(3))
def test_what_is_served_is_right_whatever_was_held_before(seed: int, store: SnapshotStore) -> None:
    publisher, table, rng = make_publisher(store), SmallTable(seed), np.random.default_rng(seed)
    rows, current = offer(table, publisher), 1
    for _ in range(40):
        held = "it is bad" if rng.random() < 0.6 else None
        now = offer(table, publisher, held)
        if held is None:
            rows, current = now, table.step
        manifest = store.current()
        assert manifest is not None
        assert manifest.version == current
        assert_rows(served(store, manifest), rows)
        for aside in store.held():
            assert aside.held == "it is bad"
            if aside.version == table.step:
                assert_rows(served(store, aside), now)
    assert publisher.close()
    assert all(view.is_closed for view in table.views)


def test_the_first_cut_of_a_process_that_is_held_leaves_the_next_one_full(store: SnapshotStore) -> None:
    table = SmallTable()
    first = make_publisher(store)
    offer(table, first)
    assert first.close()
    second = make_publisher(store)
    offer(table, second, held="it is bad")
    assert version_in_service(store) == 1
    until(lambda: second.wants_full, "a full one is wanted again")
    rows = offer(table, second)
    manifest = store.current()
    assert manifest is not None
    assert manifest.kind == "full"
    assert_rows(served(store, manifest), rows)
    assert second.close(), "nothing is owed to the store"


def test_a_stop_while_cuts_are_held_is_a_clean_one(store: SnapshotStore) -> None:
    publisher, table = make_publisher(store), SmallTable()
    offer(table, publisher)
    offer(table, publisher, held="it is bad")
    assert publisher.close()
    assert version_in_service(store) == 1


def test_after_a_held_cut_is_promoted_the_next_delta_leads_on_from_it(store: SnapshotStore) -> None:
    publisher, table = make_publisher(store), SmallTable(4)
    offer(table, publisher)
    offer(table, publisher, held="it is bad")
    promoted = offer(table, publisher, held="it is bad")
    offer(table, publisher, held="it is bad")
    store.operator.promote(3, by="the test")
    manifest = store.current()
    assert manifest is not None
    assert manifest.version == 3
    assert_rows(served(store, manifest), promoted)
    publisher.look_for_promoted()
    until(lambda: publisher.promoted, "the promotion seen")
    rows = offer(table, publisher)
    manifest = store.current()
    assert manifest is not None
    assert (manifest.kind, manifest.parent) == ("delta", 3)
    assert_rows(served(store, manifest), rows)


def test_a_promotion_of_a_version_older_than_the_current_one_is_told_once(store: SnapshotStore) -> None:
    publisher, table = make_publisher(store), SmallTable(6)
    offer(table, publisher)
    offer(table, publisher, held="it is bad")
    offer(table, publisher)
    store.operator.promote(2, by="the test")
    assert version_in_service(store) == 3, "the pointer stays"
    publisher.look_for_promoted()
    until(lambda: publisher.promoted, "the promotion seen")
    publisher.promoted = False
    offer(table, publisher, held="it is bad")
    asked_and_answered(publisher)
    assert not publisher.promoted
    assert publisher.close()


@pytest.mark.parametrize("lineage", ["line", "line.fork"])
def test_a_version_held_before_a_restart_is_told_when_it_is_promoted(lineage: str, store: SnapshotStore) -> None:
    table, before = SmallTable(7), make_publisher(store)
    offer(table, before)
    offer(table, before, held="it is bad")
    offer(table, before, held="it is bad")
    assert before.close()
    store.operator.promote(2, by="the test")
    publisher = make_publisher(store, lineage)
    asked_and_answered(publisher)
    assert not publisher.promoted, "it was promoted before this process began"
    store.operator.promote(3, by="the test")
    publisher.look_for_promoted()
    until(lambda: publisher.promoted, "the promotion seen")
    assert publisher.close()


def test_a_store_that_does_not_take_what_is_held_delays_nothing(client: redis.Redis, store: SnapshotStore) -> None:
    publisher, table = make_publisher(store), SmallTable(5)
    offer(table, publisher)
    client.client_pause(60_000, all=False)
    table.change()
    publisher.offer(replace(table.cut(), held="it is bad"))
    client.client_unpause()
    rows = offer(table, publisher)
    assert publisher.close()
    manifest = store.current()
    assert manifest is not None
    assert manifest.version == 3
    assert_rows(served(store, manifest), rows)
