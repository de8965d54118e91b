"""The scorer follows chains of deltas, and finds another way where one is broken. It looks when a test asks it to."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import redis
import torch

from feature_store.manifest import Manifest
from feature_store.payload import Precision
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.model.deltas import RowDelta
from smes.model.ids import IdKeys
from smes.model.serving_rows import ServingTable, Shadow
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.loading import TableModel, load_table_model
from smes_scorer.telemetry import Telemetry
from tests.smes_scorer.chains import SCHEMA, Chain
from tests.smes_scorer.made_payloads import delta_payload


@pytest.fixture
def now_s() -> list[float]:
    return [100.0]


@pytest.fixture
def make_swap(client: redis.Redis, namespace: str, now_s: list[float]) -> Callable[..., HotSwap]:
    """Loaders without their thread."""

    def make_swap(telemetry: Telemetry | None = None) -> HotSwap:
        return HotSwap(
            SnapshotStore(client, namespace),
            SnapshotWatcher(client, namespace),
            SCHEMA,
            load_table_model,
            FirstAnswers(),
            telemetry or Telemetry(),
            poll_s=0.1,
            monotonic_s=lambda: now_s[0],
        )

    return make_swap


@pytest.fixture
def swap(make_swap: Callable[..., HotSwap], telemetry: Telemetry) -> HotSwap:
    return make_swap(telemetry)


def assert_serves(swap: HotSwap, chain: Chain, version: int | None = None) -> None:
    """The version is in service, the newest one by default, and scores bit for bit as its weights do."""
    with swap.reading() as served:
        assert served.manifest.version == (chain.version if version is None else version)
        chain.assert_scores(served.model, served.manifest.version)


def model_of(swap: HotSwap) -> TableModel:
    assert swap.served is not None
    assert isinstance(swap.served.model, TableModel)
    return swap.served.model


def table_of(swap: HotSwap) -> ServingTable:
    table = model_of(swap).rows.table
    assert isinstance(table, ServingTable)
    return table


def lose(client: redis.Redis, namespace: str, manifest: Manifest) -> None:
    """Remove a payload behind the store's back."""
    assert client.delete(f"{{{namespace}}}:snapshots:chunk:{manifest.upload}:0") or client.delete(
        f"{{{namespace}}}:snapshots:chunk:{manifest.upload}:0"
    )


def test_every_delta_is_served_bit_for_bit_in_one_table(store: SnapshotStore, swap: HotSwap) -> None:
    chain = Chain(store)
    chain.publish("full")
    swap.refresh()
    table = table_of(swap)
    for _ in range(30):
        chain.publish()
        swap.refresh()
        assert swap.problem is None
        assert_serves(swap, chain)
        assert table_of(swap) is table
        assert model_of(swap).shadows == 0, "nobody reads an older version"


def test_a_stop_does_not_wait_for_a_long_load(
    store: SnapshotStore, swap: HotSwap, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loading, chunks = threading.Event(), swap._store.pieces

    def slowly(manifest: Manifest) -> Iterator[bytes]:
        for chunk in chunks(manifest):
            for start in range(len(chunk)):
                yield chunk[start : start + 1]
                loading.set()
                time.sleep(0.02)

    monkeypatch.setattr(swap._store, "pieces", slowly)
    size = Chain(store).publish("full").total_bytes
    assert size * 0.02 > 60
    swap.start()
    assert loading.wait(60)

    started_s = time.monotonic()
    swap.stop()

    assert time.monotonic() - started_s < 10
    assert swap.served is None
    assert caplog.messages == []


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a table of 2147483649 rows, expected fewer")])
def test_a_delta_that_cannot_be_folded_is_served_before_the_table_and_folded_later(
    store: SnapshotStore,
    swap: HotSwap,
    now_s: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail(table: ServingTable, shadow: Shadow) -> None:
        raise error

    chain = Chain(store)
    chain.publish("full")
    swap.refresh()
    with monkeypatch.context() as patched:
        patched.setattr(ServingTable, "fold", fail)
        chain.publish()
        for _ in range(10):
            swap.refresh()
        assert_serves(swap, chain)
        assert model_of(swap).shadows == 1
        assert [message.split(";")[0] for message in caplog.messages] == ["a delta could not be folded into the table"]

    now_s[0] += 5.0
    swap.refresh()

    assert_serves(swap, chain)
    assert model_of(swap).shadows == 0


def test_a_scorer_that_starts_late_loads_the_newest_base_and_the_deltas_after_it(
    client: redis.Redis, namespace: str, store: SnapshotStore, swap: HotSwap
) -> None:
    chain = Chain(store)
    first = chain.publish("full")
    lost = chain.publish()
    chain.publish()
    chain.publish_base()
    chain.publish()
    chain.publish()
    for manifest in (first, lost):  # what is before the base is not needed
        lose(client, namespace, manifest)

    swap.refresh()

    assert swap.problem is None
    assert_serves(swap, chain)


def test_deltas_that_were_missed_are_caught_up_with(store: SnapshotStore, swap: HotSwap, telemetry: Telemetry) -> None:
    chain = Chain(store)
    chain.publish("full")
    swap.refresh()
    table = table_of(swap)
    for _ in range(12):
        chain.publish()

    swap.refresh()

    assert_serves(swap, chain)
    assert table_of(swap) is table
    assert telemetry.value("full_loads_total") == 1


def test_a_request_keeps_its_version_while_more_deltas_than_shadows_are_served(
    store: SnapshotStore, swap: HotSwap
) -> None:
    chain = Chain(store)
    chain.publish("full")
    swap.refresh()
    with swap.reading() as early:
        for _ in range(15):
            chain.publish()
            swap.refresh()
            assert_serves(swap, chain)
            chain.assert_scores(early.model, 1)
        assert 1 < model_of(swap).shadows == swap.shadows < 15
    swap.refresh()

    assert model_of(swap).shadows == 0
    assert_serves(swap, chain)


def test_a_lost_delta_is_passed_by_the_next_full_snapshot(
    client: redis.Redis, namespace: str, store: SnapshotStore, swap: HotSwap
) -> None:
    chain = Chain(store)
    chain.publish("full")
    swap.refresh()
    table = table_of(swap)
    lost = chain.publish()
    chain.publish()
    lose(client, namespace, lost)

    for _ in range(3):
        swap.refresh()
        assert_serves(swap, chain, 1)
        assert "snapshot a:2: chunk 0 of 1: missing" in str(swap.problem)

    chain.publish("full")
    swap.refresh()
    assert_serves(swap, chain)
    assert swap.problem is None
    assert table_of(swap) is not table

    chain.publish()
    swap.refresh()
    assert_serves(swap, chain)


@pytest.mark.parametrize("more", [False, True], ids=["of the current version", "and a delta after it"])
def test_a_lost_delta_is_passed_by_the_next_base(
    client: redis.Redis, namespace: str, store: SnapshotStore, swap: HotSwap, now_s: list[float], more: bool
) -> None:
    chain = Chain(store)
    chain.publish("full")
    swap.refresh()
    lost = chain.publish()
    chain.publish()
    lose(client, namespace, lost)
    swap.refresh()
    assert_serves(swap, chain, 1)

    chain.publish_base()
    if more:
        chain.publish()
    else:
        now_s[0] += 6
    swap.refresh()

    assert_serves(swap, chain)
    assert swap.problem is None


@pytest.mark.parametrize("broken", ["NaN", "another version", "a default row removed"])
def test_a_delta_that_makes_no_model_leaves_the_version_before_it_in_service(
    store: SnapshotStore, swap: HotSwap, make_swap: Callable[..., HotSwap], broken: str
) -> None:
    chain = Chain(store)
    chain.publish("full")
    swap.refresh()
    name, tensor = next(
        (n, t) for n, t in chain.learner.dense_serving_state().items() if t.is_floating_point() and t.numel()
    )
    if broken == "NaN":
        chain.publish(changed={name: tensor * torch.nan})
    elif broken == "another version":
        chain.publish(payload=_delta_that(chain, version=7))
    else:
        chain.publish(payload=_delta_that(chain, remove_defaults=True))
    for _ in range(3):
        swap.refresh()
        assert_serves(swap, chain, 1)
    assert {"NaN": "NaN or infinite", "another version": "says a:7", "a default row removed": "are missing"}[
        broken
    ] in str(swap.problem)

    late = make_swap()  # without a model, it serves the version before
    chain.publish()
    late.refresh()
    if broken != "NaN":  # a later version's dense weights are its own, so that NaN of an earlier one does no harm
        assert_serves(late, chain, 1)
        assert late.problem is not None

    chain.publish_base()
    chain.publish()
    for each in (swap, late):
        each.refresh()
        assert_serves(each, chain)
        assert each.problem is None


def _delta_that(chain: Chain, version: int | None = None, remove_defaults: bool = False) -> bytes:
    """A delta that follows the chain's version but says another one, or removes a row that every table has."""
    delta = chain.learner.take_delta()
    if remove_defaults:
        removed = IdKeys(SCHEMA).required[:1]
        kept = ~np.isin(delta.keys, removed)
        delta = RowDelta(delta.keys[kept], {n: c[kept] for n, c in delta.columns.items()}, removed)
    return delta_payload(chain.learner, version or chain.learner.step_number + 1, delta)


def test_another_lineage_gets_a_table_of_its_own(store: SnapshotStore, swap: HotSwap) -> None:
    one, other = Chain(store), Chain(store, lineage="b", seed=5)
    one.publish("full")
    one.publish()
    swap.refresh()
    table = table_of(swap)
    with swap.reading() as early:
        other.publish("full")
        swap.refresh()
        other.publish()
        swap.refresh()
        one.assert_scores(early.model, one.version)
        assert_serves(swap, other)
    assert table_of(swap) is not table

    swap.refresh()
    assert model_of(swap).shadows == 0
    assert_serves(swap, other)


def test_a_scorer_that_restarts_serves_what_one_that_ran_on_serves(
    store: SnapshotStore, make_swap: Callable[..., HotSwap]
) -> None:
    chain, running = Chain(store), make_swap()
    for version in range(12):
        chain.publish("delta" if version else "full")
        if version == 6:
            chain.publish_base()
        restarted = make_swap()
        for swap in (running, restarted):
            swap.refresh()
            assert_serves(swap, chain)


@pytest.mark.parametrize(("precision", "error"), [("fp16", 2e-3), ("int8", 2e-2)])
def test_rows_on_the_wire_in_fewer_bits_score_nearly_the_same(
    store: SnapshotStore, swap: HotSwap, precision: Precision, error: float
) -> None:
    chain = Chain(store, precision=precision)
    chain.publish("full")
    for _ in range(6):
        swap.refresh()
        chain.publish()
    swap.refresh()

    assert swap.served is not None
    scores = swap.served.model.score(chain.ids, np.zeros((len(chain.ids), 0), np.float32))
    assert swap.served.manifest.precision == precision
    assert 0 < np.abs(scores - chain.scores[chain.version]).max() < error


def test_the_loader_folds_without_a_publication_when_the_last_old_request_has_ended(
    store: SnapshotStore, swap: HotSwap, until: Callable[[Callable[[], object]], None]
) -> None:
    chain = Chain(store)
    chain.publish("full")
    swap.start()
    try:
        until(lambda: swap.served is not None)
        with swap.reading():
            chain.publish()
            until(lambda: swap.shadows == 1)
        until(lambda: swap.shadows == 0)
        assert_serves(swap, chain)
    finally:
        swap.stop()
