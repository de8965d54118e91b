"""Which snapshot is put into service, and which is refused. Here the loader looks only when a test asks it to."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import redis
import torch
from safetensors.torch import save

from feature_store.config import SnapshotStoreConfig
from feature_store.entities import EntityStore
from feature_store.manifest import Manifest
from feature_store.payload import PAYLOAD_FORMAT, write_payload
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.arrays import F32, I64
from smes.errors import SnapshotNotFound
from smes.schema import Schema
from smes_scorer.answer import Answerer
from smes_scorer.config import ScorerConfig
from smes_scorer.feature_lookup import FeatureLookup
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.interface import Interfaces
from smes_scorer.loading import Load
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import Scorable
from tests.smes_scorer.made_payloads import version_payload

Publish = Callable[..., Manifest]
MakeSwap = Callable[..., HotSwap]


@pytest.fixture
def now_s() -> list[float]:
    """What the loader's clock shows."""
    return [100.0]


@pytest.fixture
def make_swap(
    client: redis.Redis,
    namespace: str,
    store: SnapshotStore,
    schema: Schema,
    load: Load,
    telemetry: Telemetry,
    now_s: list[float],
) -> MakeSwap:
    """A loader without its thread."""

    def make_swap(load: Load = load, store: SnapshotStore = store) -> HotSwap:
        watcher = SnapshotWatcher(client, namespace)
        return HotSwap(
            store, watcher, schema, load, FirstAnswers(), telemetry, poll_s=0.1, monotonic_s=lambda: now_s[0]
        )

    return make_swap


@pytest.fixture
def swap(make_swap: MakeSwap) -> HotSwap:
    return make_swap()


def version_of(swap: HotSwap) -> int | None:
    return None if swap.served is None else swap.served.manifest.version


class Slow:
    """Scores two items only when it is released."""

    def __init__(self) -> None:
        self.scoring = threading.Event()
        self.released = threading.Event()

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        if len(ids) == 2:  # not the warm-up
            self.scoring.set()
            assert self.released.wait(60)
        return np.ones((len(ids), 3), np.float32)


def test_a_request_keeps_the_model_that_it_began_with(
    client: redis.Redis, schema: Schema, store: SnapshotStore, publish: Publish, make_swap: MakeSwap, load: Load
) -> None:
    slow = Slow()
    models: list[Scorable] = [slow]
    swap = make_swap(lambda payloads, schema, before: models.pop() if models else load(payloads, schema, before))
    publish(store, 1)
    swap.refresh()
    telemetry = Telemetry()
    lookup = FeatureLookup(telemetry, retry_s=1.0)
    interfaces = Interfaces(ScorerConfig(), lambda of: EntityStore(client, of, "nothing-there"), lookup, telemetry)
    answerer = Answerer(interfaces, swap, FirstAnswers(), telemetry)
    answers: list[bytes] = []
    asker = threading.Thread(target=lambda: answers.append(answerer.answer(b'{"user_id": 1, "items": [1, 2]}')))

    asker.start()
    assert slow.scoring.wait(60)
    publish(store, 2)
    swap.refresh()
    version_in_service = version_of(swap)
    slow.released.set()
    asker.join()

    assert version_in_service == 2
    start = b'{"arm":"main","lineage":"a","version":1,"items":[{"item_id":1,"scores":{"click":1.0,'
    assert answers[0].startswith(start)


FORMAT_1 = save({"version": torch.tensor(2)}, {"lineage": "a", "version": "2"})


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"no safetensors at all", "snapshot payload: header of"),
        (FORMAT_1, f"snapshot payload: format 1, expected {PAYLOAD_FORMAT}"),
        (version_payload(2, {"lineage": "a", "version": "7"}), "its payload says a:7"),
        (write_payload({"lineage": "a", "version": "2"}, {}, {}, 0, lambda: ()).joined(), "KeyError"),
    ],
    ids=["no safetensors", "format 1", "another version", "no weights"],
)
def test_a_bad_payload_leaves_the_old_version_in_service(
    store: SnapshotStore, publish: Publish, swap: HotSwap, payload: bytes, message: str
) -> None:
    publish(store, 1)
    swap.refresh()

    publish(store, 2, payload=payload)
    swap.refresh()

    assert version_of(swap) == 1
    assert message in str(swap.problem)


def test_a_good_snapshot_ends_the_problem(store: SnapshotStore, publish: Publish, swap: HotSwap) -> None:
    publish(store, 1, payload=FORMAT_1)
    swap.refresh()

    publish(store, 2)
    swap.refresh()

    assert version_of(swap) == 2
    assert swap.problem is None


@pytest.mark.parametrize("bad", [np.full((100, 3), np.nan), np.zeros((100, 2))], ids=["NaN", "too few tasks"])
def test_a_model_that_fails_its_warm_up_never_serves(
    store: SnapshotStore, publish: Publish, make_swap: MakeSwap, bad: np.ndarray
) -> None:
    class Broken:
        def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
            scores: F32 = bad[: len(ids)].astype(np.float32)
            return scores

    swap = make_swap(lambda payloads, schema, before: Broken())
    publish(store, 1)

    swap.refresh()

    assert swap.served is None
    assert "snapshot a:1: warm-up gave scores of shape" in str(swap.problem)


def test_a_damaged_chunk_is_tried_again_after_a_while(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, swap: HotSwap, now_s: list[float]
) -> None:
    manifest = publish(store, 1)
    key = f"{{{namespace}}}:snapshots:chunk:{manifest.upload}:0"
    intact = client.get(key)
    assert isinstance(intact, bytes)

    client.set(key, intact[:-1] + b"!")
    swap.refresh()
    assert "chunk 0 of 1: SHA-256" in str(swap.problem)

    client.set(key, intact)
    swap.refresh()
    assert swap.served is None  # too early for another try

    now_s[0] += 6
    swap.refresh()
    assert version_of(swap) == 1


def test_a_snapshot_trimmed_while_it_is_read_is_followed_by_the_current_one(
    client: redis.Redis, namespace: str, publish: Publish, make_swap: MakeSwap
) -> None:
    config = SnapshotStoreConfig(retain_bytes=1, min_retained=1)
    publisher = SnapshotStore(client, namespace, config)

    class SlowReader(SnapshotStore):
        def pieces(self, manifest: Manifest) -> Iterator[bytes]:
            if manifest.version == 1:  # meanwhile the trainer publishes
                publish(publisher, 2)
                publish(publisher, 3)
                with pytest.raises(SnapshotNotFound):
                    next(super().pieces(manifest))
            return super().pieces(manifest)

    swap = make_swap(store=SlowReader(client, namespace, config))
    publish(publisher, 1)

    swap.refresh()
    assert swap.served is None
    assert "retention removed it" in str(swap.problem)

    swap.refresh()
    assert version_of(swap) == 3
    assert swap.problem is None


def test_an_older_version_is_not_put_back_into_service(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, swap: HotSwap
) -> None:
    publish(store, 4)
    publish(store, 5)
    swap.refresh()

    client.set(f"{{{namespace}}}:snapshots:current", "a:4")  # Redis restored from an older state
    swap.refresh()

    assert version_of(swap) == 5
    assert "version 4 is published, older than version 5" in str(swap.problem)


def test_another_lineage_takes_over_whatever_its_version(store: SnapshotStore, publish: Publish, swap: HotSwap) -> None:
    publish(store, 9)
    swap.refresh()

    publish(store, 1, lineage="b")
    swap.refresh()

    assert swap.served is not None
    assert swap.served.key == ("b", 1)


def test_a_version_without_its_manifest_is_counted_as_uncounted(
    client: redis.Redis, namespace: str, store: SnapshotStore, publish: Publish, swap: HotSwap, telemetry: Telemetry
) -> None:
    publish(store, 1)
    swap.refresh()
    for number in (2, 3, 4):
        publish(store, number)

    client.zrem(f"{{{namespace}}}:snapshots:history", "a:2")
    swap.refresh()

    assert version_of(swap) == 4
    assert telemetry.value("freshness_uncounted_total") == 1
