"""Derived features are the same bits wherever an event comes from: JSON, Arrow, a log in files, or a request."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from feature_store.entities import ALWAYS, EntityStore
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from simulators.logs.reader import open_log
from smes.arrays import F32
from smes.events import ExampleBlock, ImpressionBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.frozen_model import FrozenModel
from smes.model.learner import Learner
from smes.schema import MISSING, Schema
from smes_io.log_spec import LabelSource, LogSpec
from smes_io.redis_client import connect
from smes_io.schema_file import SchemaFile
from smes_scorer.answer import Answerer
from smes_scorer.config import ScorerConfig
from smes_scorer.feature_lookup import FeatureLookup
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.interface import Interfaces
from smes_scorer.loading import load_table_model
from smes_scorer.telemetry import Telemetry
from stream.codec.codec import decode, encode_impressions
from stream.log.event_log import Record
from stream.topics import IMPRESSIONS
from tests.smes.derivations import random_rows, random_schema, values_of
from tests.smes_scorer.made_payloads import delta_payload, full_payload

_MODEL = ModelConfig(ranker="shared_bottom", embedding_dim=4, head_dim=4)
_ROWS = 12


def _events(schema: Schema, rng: np.random.Generator) -> ImpressionBlock:
    """Impressions in the order of their times, each of a user and an item of its own."""
    ids, numerics, time_ms = random_rows(schema, _ROWS, rng)
    ids[:, 0], ids[:, 1] = np.arange(_ROWS) + 100, rng.permutation(_ROWS) + 500
    block = replace(ImpressionBlock.empty(schema, _ROWS), ids=ids, numerics=numerics, event_time_ms=np.sort(time_ms))
    return replace(block, impression_id=np.arange(_ROWS))


def _through_wire(events: ImpressionBlock, schema: Schema, codec: str) -> ImpressionBlock:
    sent = encode_impressions(events, schema, codec, 1)  # type: ignore[arg-type]  # a codec's name
    records = [Record(IMPRESSIONS, 0, n, each.value, each.headers, 0) for n, each in enumerate(sent)]
    decoded = decode(records, schema)
    assert not decoded.dead
    return decoded.impressions


def _through_files(events: ImpressionBlock, schema: Schema, path: Path) -> ImpressionBlock:
    rows = [values_of(schema, *row) for row in zip(events.ids, events.numerics, strict=True)]
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
    nothing = {task.name: [0] * len(rows) for task in schema.tasks}
    pq.write_table(pa.table(columns | {"time": events.event_time_ms, **nothing}), path)
    log = LogSpec("user_id", "item_id", "time", {task.name: LabelSource(task.name) for task in schema.tasks})
    file = SchemaFile(schema.name, schema.tasks, schema.features, derive=schema.derived, log=log)
    with open_log(path, file) as reader:
        (block,) = reader.blocks(8192)
    return block.impressions


def _examples(events: ImpressionBlock, schema: Schema) -> ExampleBlock:
    columns = {name: getattr(events, name) for name in ("ids", "numerics", "event_time_ms", "impression_id")}
    labels = (np.arange(_ROWS * schema.num_tasks) % 3 == 0).astype(np.float32).reshape(_ROWS, -1)
    return replace(ExampleBlock.empty(schema, _ROWS), labels=labels, **columns)


class _Service:
    """A learner whose versions are published, as a whole and as a delta, and a scorer of them over stored features."""

    def __init__(self, learner: Learner, store: SnapshotStore, watcher: SnapshotWatcher, features: EntityStore) -> None:
        self.schema, self.now_ms = learner.schema, 0
        self._learner, self._store, self._features = learner, store, features
        telemetry = Telemetry()
        self._swap = HotSwap(store, watcher, self.schema, load_table_model, FirstAnswers(), telemetry, poll_s=0.1)
        lookup = FeatureLookup(telemetry, retry_s=1.0)
        interfaces = Interfaces(ScorerConfig(), lambda of: features, lookup, telemetry)
        self._answerer = Answerer(interfaces, self._swap, FirstAnswers(), telemetry, now_ms=lambda: self.now_ms)

    def publish(self, kind: str) -> None:
        version, delta = self._learner.step_number, self._learner.take_delta()
        payload = (
            full_payload(self._learner, version) if kind == "full" else delta_payload(self._learner, version, delta)
        )
        self._store.publish(
            payload,
            lineage="a",
            version=version,
            schema_hash=self.schema.hash,
            step=version,
            created_ms=0,
            applies_to=None if kind == "full" else {version - 1},
        )
        self._swap.refresh()
        assert self._swap.served is not None
        assert self._swap.served.manifest.version == version

    def store(self, events: ImpressionBlock) -> None:
        for n in range(_ROWS):
            row = values_of(self.schema, events.ids[n], events.numerics[n])
            for entity, own in (("user", 0), ("item", 1)):
                values = {f.name: row[f.name] for f in self.schema.features[2:] if f.source == entity}
                self._features.put(entity, int(events.ids[n, own]), values, ALWAYS)  # type: ignore[arg-type]

    def scores(self, events: ImpressionBlock) -> F32:
        """Each event asked for by a request of its own, at its time; as they stand in the answers."""
        scores = []
        for n in range(_ROWS):
            row, self.now_ms = values_of(self.schema, events.ids[n], events.numerics[n]), int(events.event_time_ms[n])
            context = {f.name: row[f.name] for f in self.schema.features[2:] if f.source == "context"}
            request = {"user_id": row["user_id"], "items": [row["item_id"]], "context": context}
            (item,) = json.loads(self._answerer.answer(json.dumps(request).encode()))["items"]
            scores.append([item["scores"][task.name] for task in self.schema.tasks])
        return np.array(scores, np.float32)


@pytest.fixture
def service(redis_url: str, namespace: str) -> Callable[[Learner, int], _Service]:
    """Starts services that share nothing."""

    def service(learner: Learner, number: int) -> _Service:
        client, own = connect(redis_url, 30.0), f"{namespace}-{number}"
        with closing(client):
            features = EntityStore(client, learner.schema, own)
            return _Service(learner, SnapshotStore(client, own), SnapshotWatcher(client, own), features)

    return service


@pytest.mark.parametrize("seed", range(6))
def test_training_and_serving_read_the_same_bits_on_every_path(
    service: Callable[[Learner, int], _Service], tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    schema = random_schema(rng)
    events, others = _events(schema, rng), _events(schema, rng)
    learner, again = (Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu")) for _ in range(2))
    served = service(learner, seed)
    served.store(events)
    for kind, block in (("full", events), ("delta", others)):
        learner.step(learner.prepare(_examples(block, schema)))
        served.publish(kind)
    paths = {
        "json": _through_wire(events, schema, "json"),
        "arrow": _through_wire(events, schema, "arrow"),
        "files": _through_files(events, schema, tmp_path / "log.parquet"),
    }

    answers, frozen = served.scores(events), FrozenModel.freeze(learner)
    state = learner.state()
    trained = {}
    for name, block in paths.items():
        one_by_one = [
            frozen.score(block.ids[n : n + 1], block.numerics[n : n + 1], block.event_time_ms[n : n + 1])
            for n in range(_ROWS)
        ]
        np.testing.assert_array_equal(np.concatenate(one_by_one), answers, err_msg=name)
        again.load_state(state)
        batch = again.prepare(_examples(block, schema))
        just_before = FrozenModel.freeze(again).score(
            block.ids, block.numerics, block.event_time_ms
        )  # with new ids' rows
        trained[name] = (batch.numerics_BF.numpy(), batch.cells_BW.numpy(), again.step(batch).scores.numpy())
        np.testing.assert_allclose(trained[name][2], just_before, rtol=1e-5, atol=1e-6)
    for name in ("arrow", "files"):
        for got, expected in zip(trained[name], trained["json"], strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=name)
    assert (events.ids[:, 2:] != MISSING).any()
