"""What operators decide about serving: pins, ways back, promotions, and what becomes of their records."""

import logging
from typing import Any

import pytest
import redis
from msgspec.structs import replace

from feature_store.manifest import Manifest
from feature_store.pins import MAX_DECISIONS
from feature_store.signing import Signer
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.errors import PinError, SnapshotError, SnapshotForged, SnapshotGap, SnapshotNotFound
from tests.feature_store.stores import make_store

BY = "kim@desk"


def publish(
    store: SnapshotStore,
    version: int,
    *,
    after: set[int] | None = None,
    held: str | None = None,
    lineage: str = "a",
    schema_hash: str = "s",
    size: int = 10,
) -> Manifest:
    return store.publish(
        f"{version}".encode().ljust(size),
        lineage=lineage,
        version=version,
        schema_hash=schema_hash,
        step=version,
        created_ms=0,
        applies_to=after,
        held=held,
    )


def published(store: SnapshotStore, *versions: int) -> None:
    for version in versions:
        publish(store, version)


def served(store: SnapshotStore) -> str | None:
    manifest = store.to_serve()
    return None if manifest is None else f"{manifest.lineage}:{manifest.version}"


def versions(manifests: tuple[Manifest, ...]) -> list[int]:
    return [manifest.version for manifest in manifests]


def rolled_back(store: SnapshotStore) -> set[str]:
    return store.pins.rolled_back({f"{m.lineage}:{m.version}": i for i, m in enumerate(store.list(), 1)})


@pytest.fixture
def decision_key(namespace: str) -> str:
    return f"{{{namespace}}}:snapshots:decision"


def test_without_a_decision_the_current_snapshot_is_served(store: SnapshotStore) -> None:
    assert store.to_serve() is None

    published(store, 1, 2)

    assert served(store) == "a:2"
    assert store.pins.history() == ()


def test_a_pin_holds_while_publications_go_on(store: SnapshotStore) -> None:
    published(store, 1, 2)

    store.operator.pin(1, why="2 is bad", by=BY)
    publish(store, 3, after={2})

    assert (served(store), store.pointer()) == ("a:1", "a:3")


def test_unpin_follows_the_current_snapshot_again(store: SnapshotStore) -> None:
    published(store, 1, 2)
    store.operator.pin(1, by=BY)

    store.operator.unpin(by=BY)

    assert served(store) == "a:2"
    published(store, 3)
    assert served(store) == "a:3"


def test_there_is_nothing_to_unpin_twice(store: SnapshotStore) -> None:
    with pytest.raises(SnapshotError, match="nothing is pinned"):
        store.operator.unpin(by=BY)
    published(store, 1)
    store.operator.pin(1, by=BY)
    store.operator.unpin(by=BY)

    with pytest.raises(SnapshotError, match="nothing is pinned"):
        store.operator.unpin(by=BY)


def test_a_rollback_goes_to_the_version_before_and_marks_what_came_after(store: SnapshotStore) -> None:
    published(store, 1, 2, 3)

    first = store.operator.rollback(by=BY)
    assert (served(store), rolled_back(store)) == ("a:2", {"a:3"})
    second = store.operator.rollback(by=BY)

    assert (served(store), rolled_back(store)) == ("a:1", {"a:2", "a:3"})
    assert (first.before, second.before) == ("a:3", "a:2")
    published(store, 4)
    assert (served(store), rolled_back(store)) == ("a:1", {"a:2", "a:3"})


def test_a_rollback_steps_over_what_was_rolled_back_and_what_has_another_schema(store: SnapshotStore) -> None:
    publish(store, 1)
    publish(store, 2, schema_hash="other")
    published(store, 3, 4)
    store.operator.rollback(3, by=BY)
    store.operator.unpin(by=BY)  # 4 again, which is still marked
    publish(store, 5)
    store.operator.rollback(by=BY)
    assert served(store) == "a:3"

    store.operator.rollback(by=BY)

    assert served(store) == "a:1"
    with pytest.raises(SnapshotNotFound, match="no snapshot is listed from before a:1, which is in service"):
        store.operator.rollback(by=BY)


def test_a_rollback_to_a_version_of_another_lineage(store: SnapshotStore) -> None:
    publish(store, 7, lineage="a")
    publish(store, 3, lineage="b")

    store.operator.rollback(by=BY)

    assert (served(store), rolled_back(store)) == ("a:7", {"b:3"})


def test_a_rollback_does_not_go_forward(store: SnapshotStore) -> None:
    published(store, 1, 2, 3)
    store.operator.rollback(1, by=BY)

    with pytest.raises(
        SnapshotError, match="snapshot a:2: expected a version that was published before a:1, which is in"
    ):
        store.operator.rollback(2, by=BY)


def test_a_promoted_version_serves_until_the_next_publication(store: SnapshotStore) -> None:
    published(store, 1, 2, 3)
    store.operator.rollback(1, by=BY)

    store.operator.promote(2, by=BY)

    assert (served(store), store.pointer(), rolled_back(store)) == ("a:2", "a:3", {"a:3"})
    publish(store, 4, after={3})
    assert served(store) == "a:4"


def test_a_held_version_that_is_promoted_becomes_current(store: SnapshotStore) -> None:
    publish(store, 1)
    publish(store, 2, after={1}, held="worse")
    publish(store, 3, after={1}, held="worse still")
    store.operator.pin(1, by=BY)

    decision = store.operator.promote(by=BY, why="looked at it")

    assert (decision.version, store.pointer(), served(store)) == (3, "a:3", "a:3")
    assert (versions(store.list()), versions(store.held())) == ([1, 3], [2])
    assert publish(store, 4, after={1, 3}).parent == 3
    assert [store.load(m).strip() for m in store.chain(store.get("a", 4))] == [b"1", b"3", b"4"]


def test_a_delta_that_does_not_apply_to_what_was_promoted_is_refused(store: SnapshotStore) -> None:
    publish(store, 1)
    publish(store, 2, after={1}, held="worse")
    store.operator.promote(2, by=BY)

    with pytest.raises(SnapshotGap, match="a:2 is current, expected version 1"):
        publish(store, 3, after={1})


def test_a_held_version_older_than_the_current_one_serves_until_the_next_publication(store: SnapshotStore) -> None:
    publish(store, 1)
    publish(store, 2, after={1}, held="worse")
    publish(store, 3, after={1})

    store.operator.promote(2, by=BY)

    assert (served(store), store.pointer(), store.held()) == ("a:2", "a:3", ())
    publish(store, 4, after={3})
    assert served(store) == "a:4"


def test_a_held_version_is_not_pinned(store: SnapshotStore) -> None:
    publish(store, 1)
    publish(store, 2, held="worse")

    with pytest.raises(SnapshotError, match="snapshot a:2: held, expected one that was published; promote it first"):
        store.operator.pin(2, by=BY)


@pytest.mark.parametrize("action", ["pin", "rollback", "promote"])
def test_a_version_that_is_not_there_cannot_be_served(store: SnapshotStore, action: str) -> None:
    published(store, 1, 2)

    with pytest.raises(SnapshotNotFound, match=r"snapshot a:9: not in Redis|snapshot a:0: not in Redis"):
        getattr(store.operator, action)(0 if action == "rollback" else 9, by=BY)
    with pytest.raises(SnapshotNotFound, match="snapshot b:1: not in Redis"):
        getattr(store.operator, action)(1, "b", by=BY)
    assert served(store) == "a:2"


def test_a_version_whose_chunks_are_gone_cannot_be_served(
    store: SnapshotStore, client: redis.Redis, namespace: str
) -> None:
    first = publish(store, 1)
    publish(store, 2, after={1})
    publish(store, 3)
    client.delete(f"{{{namespace}}}:snapshots:chunk:{first.upload}:0")

    with pytest.raises(SnapshotError, match="snapshot a:2: 1 of its chunks, or of those that it leads on from"):
        store.operator.pin(2, by=BY)


def test_nothing_can_be_decided_before_the_first_publication(store: SnapshotStore) -> None:
    with pytest.raises(SnapshotNotFound, match="version 1: nothing is in service, expected a lineage"):
        store.operator.pin(1, by=BY)
    with pytest.raises(SnapshotNotFound, match="nothing is in service and not listed"):
        store.operator.rollback(by=BY)
    with pytest.raises(SnapshotNotFound, match="no snapshot is held"):
        store.operator.promote(by=BY)


def test_the_history_says_who_why_when_and_what(store: SnapshotStore) -> None:
    published(store, 1, 2)

    store.operator.pin(1, why="AUC fell", by=BY)
    store.operator.promote(2, why="a mistake", by="lee@desk")

    told = [(d.action, d.name, d.before, d.why, d.by) for d in store.pins.history()]
    assert told == [("pin", "a:1", "a:2", "AUC fell", BY), ("promote", "a:2", "a:1", "a mistake", "lee@desk")]
    first, second = store.pins.history()
    assert first.number < second.number
    assert 0 <= second.at_ms - first.at_ms < 60_000


def test_the_history_is_bounded(store: SnapshotStore, client: redis.Redis, namespace: str) -> None:
    published(store, 1, 2)
    key = f"{{{namespace}}}:snapshots:decisions"
    store.operator.pin(1, by=BY)
    client.hset(key, mapping={str(number): "old" for number in range(MAX_DECISIONS + 20)})

    store.operator.pin(2, by=BY)

    assert client.hlen(key) == MAX_DECISIONS
    assert [d.version for d in store.pins.history()] == [1, 2]


def test_a_decision_wakes_whoever_waits(store: SnapshotStore, client: redis.Redis, namespace: str) -> None:
    published(store, 1, 2)
    watcher = SnapshotWatcher(client, namespace, poll_s=100.0)
    assert watcher.wait(10)
    assert not watcher.wait(0.05)

    store.operator.pin(1, by=BY)

    assert watcher.wait(60)
    watcher.close()


def test_what_is_published_while_an_operator_decides_is_seen(
    store: SnapshotStore, client: redis.Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(store, 1, 2)
    other, look, looks = make_store(client, namespace), store.operator._look, []

    def slow_look() -> object:
        found = look()
        looks.append(found)
        if len(looks) == 1:
            publish(other, 3)
        return found

    monkeypatch.setattr(store.operator, "_look", slow_look)
    store.operator.rollback(by=BY)

    assert (len(looks), served(store), rolled_back(store)) == (2, "a:2", {"a:3"})


def test_a_lost_answer_does_not_go_back_twice(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    published(store, 1, 2, 3)
    script, calls = store.operator._script, []

    def losing(**arguments: Any) -> object:
        answer = script(**arguments)
        calls.append(answer)
        if len(calls) == 1:
            raise redis.ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(store.operator, "_script", losing)
    decision = store.operator.rollback(by=BY)

    assert (decision.version, served(store), len(store.decisions())) == (2, "a:2", 1)


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        (b"\xff\x00junk", "expected a decision about serving"),
        (b'{"number": 5}', "expected a decision about serving"),
        (b"x" * 100_000, "expected at most 32768 bytes"),
        (b"[" * 5000, "expected a decision about serving"),
        (None, "missing, expected decision"),
        (["a list"], "expected a decision about serving"),
    ],
    ids=["bytes", "fields", "long", "deep", "missing", "list"],
)
def test_a_broken_pin_is_refused_and_decided_anew(
    store: SnapshotStore, client: redis.Redis, namespace: str, decision_key: str, junk: object, message: str
) -> None:
    published(store, 1, 2)
    store.operator.pin(1, by=BY)
    client.delete(decision_key)
    if isinstance(junk, list):
        client.rpush(decision_key, *junk)
    elif isinstance(junk, bytes):
        client.set(decision_key, junk)

    with pytest.raises(PinError, match=message):
        store.to_serve()
    fresh = make_store(client, namespace)
    with pytest.raises(PinError, match=message):
        fresh.to_serve()
    assert versions(fresh.fallbacks()) == [1]

    fresh.operator.unpin(by=BY)
    assert (served(store), served(fresh)) == ("a:2", "a:2")


def test_an_older_decision_is_no_way_back(
    store: SnapshotStore, client: redis.Redis, namespace: str, decision_key: str
) -> None:
    published(store, 1, 2)
    store.operator.pin(1, by=BY)
    old = client.get(decision_key)
    store.operator.promote(2, by=BY)
    client.set(decision_key, old)  # type: ignore[arg-type]  # of redis

    for reader in (store, make_store(client, namespace)):
        with pytest.raises(PinError, match=r"decision \d+, expected \d+ or later"):
            reader.to_serve()


def test_a_number_of_the_far_future_is_refused(
    store: SnapshotStore, client: redis.Redis, decision_key: str, namespace: str
) -> None:
    published(store, 1, 2)
    decision = store.operator.pin(1, by=BY)
    client.set(decision_key, replace(decision, number=2**52).text(Signer(namespace)))

    with pytest.raises(PinError, match=f"decision {2**52}, expected the time in milliseconds"):
        store.to_serve()
    store.operator.pin(2, by=BY)
    assert served(store) == "a:2"


def test_a_pin_to_a_version_that_is_gone_is_named(store: SnapshotStore, client: redis.Redis, namespace: str) -> None:
    published(store, 1, 2, 3)
    store.operator.pin(2, by=BY)
    client.hdel(f"{{{namespace}}}:snapshots:manifests", "a:2")

    with pytest.raises(PinError, match="snapshot a:2: pinned by kim@desk, but it is gone"):
        store.to_serve()
    assert versions(store.fallbacks()) == [1]


def test_junk_in_the_history_is_stepped_over(store: SnapshotStore, client: redis.Redis, namespace: str) -> None:
    published(store, 1, 2)
    key = f"{{{namespace}}}:snapshots:decisions"
    store.operator.rollback(by=BY)
    client.hset(key, mapping={"7": "junk", "8": "x" * 100_000, "nine": "{}"})
    assert ([d.version for d in store.pins.history()], rolled_back(store)) == ([1], {"a:2"})

    client.delete(key)
    client.set(key, "no hash")
    assert (store.pins.history(), served(store)) == ((), "a:1")
    store.operator.pin(2, by=BY)
    assert [d.version for d in store.pins.history()] == [2]


def test_fallbacks_leave_out_what_was_rolled_back(store: SnapshotStore) -> None:
    published(store, 1, 2, 3)
    store.operator.rollback(by=BY)
    store.operator.unpin(by=BY)
    published(store, 4)

    assert versions(store.fallbacks()) == [4, 2, 1]
    store.operator.rollback(2, by=BY)
    assert versions(store.fallbacks()) == [2, 1]


def test_a_signed_decision_of_another_namespace_or_key_is_refused(client: redis.Redis, namespace: str) -> None:
    key = ("k1", b"0123456789abcdef0123456789abcdef")
    signed = SnapshotStore(client, namespace, signer=Signer(namespace, (key,)))
    other = SnapshotStore(client, f"{namespace}-2", signer=Signer(f"{namespace}-2", (key,)))
    for store in (signed, other):
        published(store, 1, 2)
        store.operator.pin(1, by=BY)
    assert served(signed) == "a:1"
    place = f"{{{namespace}}}:snapshots:decision"
    good = client.get(place)
    assert isinstance(good, bytes)

    for forged in (
        client.get(f"{{{namespace}-2}}:snapshots:decision"),
        good.partition(b"\n")[0],
        good.replace(b'"version":1', b'"version":2'),
        good[:-1] + (b"0" if good[-1:] != b"0" else b"1"),
    ):
        assert isinstance(forged, bytes)
        client.set(place, forged)
        with pytest.raises(SnapshotForged, match="decision: pin: "):
            signed.to_serve()

    client.set(place, good)
    assert served(signed) == "a:1"


def test_retention_keeps_what_is_pinned_in_service_and_before_with_its_chain(
    client: redis.Redis, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(client, namespace, retain_bytes=2500, min_retained=1, chunk_bytes=1000)
    publish(store, 1, size=500)
    publish(store, 2, size=500)
    publish(store, 3, after={2}, size=500)
    publish(store, 4, size=500)
    store.operator.pin(3, by=BY)

    with caplog.at_level(logging.WARNING, "feature_store.retention"):
        for version in range(5, 15):
            publish(store, version, size=900)

    # 3 and what it leads on from; 4, in service before; and what was current when the newest came.
    assert versions(store.list()) == [2, 3, 4, 13, 14]
    assert [store.load(m).strip() for m in store.chain(store.get("a", 3))] == [b"2", b"3"]
    assert any("a:3" in message and "retain_bytes (2500)" in message for message in caplog.messages)


def test_without_a_decision_the_version_before_the_current_one_is_kept(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=1, min_retained=1)

    published(store, 1, 2, 3, 4)

    assert versions(store.list()) == [3, 4]
    store.operator.rollback(by=BY)
    published(store, 5, 6, 7)
    assert versions(store.list()) == [3, 4, 6, 7]
    assert served(store) == "a:3"


def test_a_held_version_goes_with_the_chain_that_it_leads_on_from(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, retain_bytes=1, min_retained=1)
    publish(store, 1)
    publish(store, 2, after={1}, held="worse")
    publish(store, 3, held="a full one")
    assert versions(store.held()) == [2, 3]

    published(store, 4, 5, 6)

    assert versions(store.held()) == [3]
    assert len(client.keys(f"*{namespace}*chunk*")) == 3  # of 3, 5 and 6
