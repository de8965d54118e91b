"""What real learners that share out the rows publish together is what they have, bit for bit; a scorer scores by it.

Ids are admitted, expire and are given back for a budget, so that deltas have rows that went, too.
"""

import threading
from types import SimpleNamespace
from typing import Any

import redis
import torch

from feature_store.config import SnapshotStoreConfig
from feature_store.folding import read_weights
from feature_store.payload import read_payload
from feature_store.snapshots import SnapshotStore
from smes.model.config import OptimizerConfig
from smes.model.learner import Learner
from smes.model.rows_config import RowsConfig
from smes.world import World
from smes_io.clock import wall_clock_ms
from smes_io.redis_client import connect
from smes_scorer.loading import load_table_model
from smes_scorer.payloads import Payloads
from tests.smes.streams import RICH_SCHEMA, stream
from tests.smes.test_sharded_learner import _SMALL, _part
from tests.smes_scorer.made_payloads import full_payload
from tests.trainer.test_served_weights import by_key
from tests.worlds import on_ranks
from trainer.cut_offers import CutOffers
from trainer.other_ranks import OtherRanks
from trainer.part_uploader import PartUploader
from trainer.publisher import Publisher

ROWS = RowsConfig(admit_after=2, shared_rows=3, expire_after_s=8.0, budget=40)


def test_what_serves_is_what_the_ranks_have_learned(client: redis.Redis, redis_url: str, namespace: str) -> None:
    batches = stream(RICH_SCHEMA, batches=10, size=32, items=60)
    had: list[list[dict[str, torch.Tensor]]] = [[], []]

    def work(world: World) -> None:
        with connect(redis_url, 20.0) as own:
            store = SnapshotStore(own, namespace, SnapshotStoreConfig(chunk_bytes=3000, max_chain_length=3))
            learner = Learner(
                RICH_SCHEMA, _SMALL, OptimizerConfig(), ROWS, device=torch.device("cpu"), seed=3, world=world
            )
            offers = offers_of(world, learner, store)
            for step, block in enumerate(batches):
                learner.step(learner.prepare(_part(world, block, step)))
                offers.offer()
                had[world.rank].append(learner.serving_state())
                while not world.broadcast(b"1" if is_published(offers) else b""):
                    offers.exchange()
            assert offers.close()

    on_ranks(2, work)

    store = SnapshotStore(client, namespace)
    manifests = store.list()
    assert [manifest.version for manifest in manifests] == list(range(1, 11))
    assert store.bases(manifests)
    has_gone, before = False, set[int]()
    for manifest in manifests:
        parts = [of_rank[manifest.version - 1] for of_rank in had]
        together = {
            name: torch.cat([part[name] for part in parts]) if name.startswith("table.") else parts[0][name]
            for name in parts[0]
        }
        got, expected = by_key(read_weights(store, manifest)[0]), by_key(together)
        assert got.keys() == expected.keys()
        for name, array in expected.items():
            assert got[name].tobytes() == array.tobytes(), name
        keys = set(got["table.keys"].tolist())
        has_gone, before = has_gone or bool(before - keys), keys
    assert has_gone
    way = store.chain(manifests[-1])
    served = load_table_model(Payloads(store, {}, RICH_SCHEMA.hash, way, threading.Event()), RICH_SCHEMA)
    alone = Learner(RICH_SCHEMA, _SMALL, OptimizerConfig(), ROWS, device=torch.device("cpu"))
    alone.load_serving_state(together, 10)
    payload = full_payload(alone, 10)
    reference = load_table_model([read_payload([payload], len(payload))], RICH_SCHEMA)
    block = batches[-1]
    scores = [model.score(block.ids, block.numerics, block.event_time_ms) for model in (served, reference)]
    assert scores[0].tobytes() == scores[1].tobytes()


def offers_of(world: World, learner: Learner, store: SnapshotStore) -> CutOffers:
    nothing: Any = SimpleNamespace(summary=dict, progressive=dict, start=lambda: None, taken_times=lambda: None)
    nothing.positions_by_topic = dict
    parts: Any = SimpleNamespace(learner=learner, stream=nothing, evaluation=nothing, experts=nothing)
    offers = CutOffers(
        parts,
        nothing,
        None,
        event_time_ms=lambda: None,
        deliver=lambda: None,
        forget_sent=lambda: None,
        world=world,
    )
    if world.rank == 0:
        others = OtherRanks(world.size - 1, timeout_s=30.0)
        offers.open(Publisher(store, RICH_SCHEMA, _SMALL.to_dict(), "line", now_ms=wall_clock_ms, others=others), 0)
    else:
        offers.open_part(PartUploader(store, RICH_SCHEMA, _SMALL.to_dict(), world.rank, world.size))
    return offers


def is_published(offers: CutOffers) -> bool:
    publisher = offers.publisher
    return publisher is not None and publisher.published > 0 and not (publisher.has_waiting or publisher.num_deltas)
