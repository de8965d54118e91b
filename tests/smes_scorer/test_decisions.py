"""Scorers serve what operators decided: they go back, stay, go on, and name a decision that cannot be followed."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import httpx
import pytest
import redis

from feature_store.manifest import Manifest
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.loading import load_table_model
from smes_scorer.telemetry import Telemetry
from tests.smes_scorer.chains import SCHEMA, Chain, four_versions

BY = "kim@desk"
Publish = Callable[..., Manifest]
Starting = Callable[..., AbstractContextManager[httpx.Client]]
Until = Callable[[Callable[[], object]], None]


@pytest.fixture
def answers() -> FirstAnswers:
    return FirstAnswers()


@pytest.fixture
def make_swap(
    client: redis.Redis, namespace: str, telemetry: Telemetry, answers: FirstAnswers
) -> Callable[[], HotSwap]:
    """Loaders without their thread, each with a store of its own."""

    def make_swap() -> HotSwap:
        store, watcher = SnapshotStore(client, namespace), SnapshotWatcher(client, namespace)
        return HotSwap(store, watcher, SCHEMA, load_table_model, answers, telemetry, poll_s=0.1)

    return make_swap


@pytest.fixture
def swap(make_swap: Callable[[], HotSwap]) -> HotSwap:
    return make_swap()


@pytest.fixture
def chain(store: SnapshotStore) -> Chain:
    return four_versions(store)


def assert_serves(swap: HotSwap, chain: Chain, version: int) -> None:
    """The version is in service and scores bit for bit as its weights do."""
    swap.refresh()
    assert swap.problem is None
    with swap.reading() as served:
        assert served.manifest.version == version
        chain.assert_scores(served.model, version)


def test_serving_goes_back_stays_and_goes_on(swap: HotSwap, store: SnapshotStore, chain: Chain) -> None:
    assert_serves(swap, chain, 4)

    store.operator.rollback(2, by=BY)
    assert_serves(swap, chain, 2)
    chain.publish()
    assert_serves(swap, chain, 2)
    store.operator.pin(3, by=BY)
    assert_serves(swap, chain, 3)
    store.operator.pin(1, by=BY)
    assert_serves(swap, chain, 1)
    store.operator.unpin(by=BY)
    assert_serves(swap, chain, 5)
    chain.publish()
    assert_serves(swap, chain, 6)


def test_requests_that_began_with_a_later_version_end_with_it(
    swap: HotSwap, store: SnapshotStore, chain: Chain
) -> None:
    swap.refresh()

    with swap.reading() as before:
        store.operator.pin(1, by=BY)
        assert_serves(swap, chain, 1)
        chain.publish()
        store.operator.unpin(by=BY)
        assert_serves(swap, chain, 5)
        chain.assert_scores(before.model, 4)


def test_a_scorer_that_starts_loads_what_is_pinned(
    make_swap: Callable[[], HotSwap], store: SnapshotStore, chain: Chain
) -> None:
    store.operator.pin(2, by=BY)
    chain.publish()

    assert_serves(make_swap(), chain, 2)


def test_a_promoted_version_is_followed_by_the_next_delta(swap: HotSwap, store: SnapshotStore, chain: Chain) -> None:
    assert_serves(swap, chain, 4)

    store.operator.promote(2, by=BY)
    assert_serves(swap, chain, 2)
    chain.publish()
    assert_serves(swap, chain, 5)


def test_after_unpin_a_scorer_goes_back_to_what_was_promoted_before_a_pin(
    swap: HotSwap, store: SnapshotStore, chain: Chain
) -> None:
    chain.publish("full")
    store.operator.pin(5, by=BY)
    assert_serves(swap, chain, 5)

    store.operator.promote(3, by=BY)

    assert_serves(swap, chain, 3)


def test_an_older_pointer_alone_is_no_way_back(
    swap: HotSwap, store: SnapshotStore, chain: Chain, client: redis.Redis, namespace: str
) -> None:
    store.operator.pin(3, by=BY)
    store.operator.unpin(by=BY)
    assert_serves(swap, chain, 4)

    client.set(f"{{{namespace}}}:snapshots:current", "a:3")
    swap.refresh()

    assert swap.served is not None
    assert swap.served.manifest.version == 4
    assert "version 3 is published, older than version 4 in service" in str(swap.problem)


@pytest.mark.parametrize("harm", ["junk", "missing", "older", "version gone"])
def test_a_decision_that_cannot_be_followed_is_named_and_serving_stays(
    swap: HotSwap,
    store: SnapshotStore,
    chain: Chain,
    telemetry: Telemetry,
    client: redis.Redis,
    namespace: str,
    harm: str,
) -> None:
    prefix = f"{{{namespace}}}:snapshots:"
    store.operator.pin(1, by=BY)
    old = client.get(f"{prefix}decision")
    assert isinstance(old, bytes)
    store.operator.pin(3, by=BY)
    assert_serves(swap, chain, 3)

    if harm == "missing":
        client.delete(f"{prefix}decision")
    elif harm == "version gone":
        store.operator.pin(2, by=BY)
        client.hdel(f"{prefix}manifests", "a:2")
    else:
        client.set(f"{prefix}decision", b"junk" if harm == "junk" else old)
    for _ in range(3):
        swap.refresh()

    with swap.reading() as served:
        chain.assert_scores(served.model, 3)
    expected = {
        "junk": "expected a decision about serving",
        "missing": "which pins a:3, or later",
        "older": "decision ",
        "version gone": "snapshot a:2: pinned by kim@desk, but it is gone",
    }
    assert expected[harm] in str(swap.problem)
    assert telemetry.value("refusals_total", {"reason": "pin"}) == 1
    assert telemetry.value("load_failures_total") == 1
    store.operator.unpin(by=BY)
    assert_serves(swap, chain, 4)


@pytest.mark.parametrize("harm", ["junk", "version gone"])
def test_a_scorer_that_starts_under_a_broken_decision_serves_nothing_that_was_rolled_back(
    make_swap: Callable[[], HotSwap],
    store: SnapshotStore,
    chain: Chain,
    client: redis.Redis,
    namespace: str,
    harm: str,
) -> None:
    store.operator.rollback(2, by=BY)
    if harm == "junk":
        client.set(f"{{{namespace}}}:snapshots:decision", b"junk")
    else:
        client.hdel(f"{{{namespace}}}:snapshots:manifests", "a:2")
    swap = make_swap()

    swap.refresh()
    swap.refresh()

    assert swap.problem is not None
    with swap.reading() as served:
        assert served.manifest.version == (2 if harm == "junk" else 1)
        chain.assert_scores(served.model, served.manifest.version)


def test_feedback_counts_once_for_freshness_however_often_its_version_serves(
    client: redis.Redis,
    namespace: str,
    store: SnapshotStore,
    publish: Publish,
    schema: object,
    load: object,
    telemetry: Telemetry,
    answers: FirstAnswers,
) -> None:
    watcher = SnapshotWatcher(client, namespace)
    swap = HotSwap(store, watcher, schema, load, answers, telemetry, poll_s=0.1)  # type: ignore[arg-type]
    counted = []

    def answer() -> None:
        swap.refresh()
        assert swap.served is not None
        first = answers.answered(swap.served.key, 10_000)
        counted.append((swap.served.manifest.version, None if first is None else int(first.count.sum())))

    publish(store, 1)
    answer()
    publish(store, 2, arrivals=((100, 2),))
    answer()
    store.operator.pin(1, by=BY)
    answer()
    publish(store, 3, arrivals=((200, 5),))
    answer()
    store.operator.unpin(by=BY)
    answer()

    assert counted == [(1, 0), (2, 2), (1, None), (1, None), (3, 5)]
    assert telemetry.value("freshness_uncounted_total") == 0


def test_a_rollback_is_in_effect_in_three_scorers_long_before_they_look_by_themselves(
    store: SnapshotStore, publish: Publish, starting: Starting, until: Until
) -> None:
    for version in (1, 2, 3):
        publish(store, version)
    with ExitStack() as stack:
        scorers = [stack.enter_context(starting(poll_s=60.0)) for _ in range(3)]
        until(lambda: all(http.get("/health/ready").status_code == 200 for http in scorers))

        def answer(http: httpx.Client) -> int:
            return int(http.post("/v1/score", json={"user_id": 1, "items": [1]}).json()["version"])

        assert [answer(http) for http in scorers] == [3, 3, 3]
        begun_s = time.monotonic()
        store.operator.rollback(why="3 is bad", by=BY)
        until(lambda: all(answer(http) == 2 for http in scorers))
        took_s = time.monotonic() - begun_s

        assert took_s < 20.0  # of 60: they were told
        for http in scorers:
            assert http.get("/health/ready").json()["status"] == "ready"
            assert "smes_scorer_pinned 1.0" in http.get("/metrics").text
