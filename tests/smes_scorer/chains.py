"""A small trainer that publishes full snapshots, deltas and bases, and what each of its versions scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from feature_store.manifest import Manifest
from feature_store.payload import Precision, read_payload
from feature_store.pieces import Payload
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.schema import Feature, Schema, Task
from smes_scorer.loading import load_table_model
from tests.smes_scorer.made_payloads import delta_payload, full_payload

SCHEMA = Schema("chains", tasks=(Task("click"), Task("like")), features=(Feature("tags", "bag", max_length=2),))
MODEL = ModelConfig(ranker="shared_bottom", embedding_dim=4, head_dim=4)


def new_learner(seed: int = 0) -> Learner:
    """A learner before its first step."""
    return Learner(SCHEMA, MODEL, OptimizerConfig(), device=torch.device("cpu"), seed=seed)


class Chain:
    """One lineage: a learner that trains on random examples and is published version by version.

    Attributes:
        scores: Version → what its weights score for :attr:`ids`, float32 [N, T].
        ids: int64 [N, W]; some of them are never trained on.
    """

    def __init__(
        self, store: SnapshotStore, *, lineage: str = "a", seed: int = 0, precision: Precision = "fp32"
    ) -> None:
        self.learner = new_learner(seed)
        self.scores: dict[int, F32] = {}
        self.ids: I64 = np.random.default_rng(seed).integers(0, 400, (50, SCHEMA.id_width))
        self._rng = np.random.default_rng(seed + 1)
        self._store = store
        self._lineage = lineage
        self._precision = precision
        self.version = 0
        self.manifests: dict[int, Manifest] = {}

    def train(self) -> None:
        """Take one step on examples whose ids are newer each time."""
        examples = ExampleBlock.empty(SCHEMA, 32)
        low = 3 * self.learner.step_number
        examples.ids[:] = self._rng.integers(low, low + 60, examples.ids.shape)
        examples.labels[:] = self._rng.random(examples.labels.shape) < 0.4
        self.learner.step(self.learner.prepare(examples))

    def publish(
        self,
        kind: str = "delta",
        *,
        train: bool = True,
        payload: bytes | None = None,
        changed: Mapping[str, torch.Tensor] | None = None,
        **more: Any,
    ) -> Manifest:
        """Train, and publish what changed, or everything. ``changed`` tensors are published instead of the own ones.

        ``more`` goes to the store.
        """
        if train:
            self.train()
        before, self.version = self.version, self.learner.step_number
        delta = self.learner.take_delta()
        if payload is None and kind == "full":
            payload = full_payload(self.learner, self.version, lineage=self._lineage, changed=changed)
        elif payload is None:
            payload = delta_payload(
                self.learner, self.version, delta, lineage=self._lineage, changed=changed, precision=self._precision
            )
        manifest = self._store.publish(
            payload,
            lineage=self._lineage,
            version=self.version,
            schema_hash=SCHEMA.hash,
            step=self.version,
            created_ms=0,
            applies_to=None if kind == "full" else {before},
            precision=self._precision if kind == "delta" else "fp32",
            **more,
        )
        state = self.learner.serving_state()
        self.scores[self.version] = ServingModel.from_state(SCHEMA, MODEL, state).score(self.ids, self._numerics)
        self.manifests[self.version] = manifest
        return manifest

    def publish_base(self) -> Manifest:
        """Publish all weights of the version that was published last."""
        payload = Payload.of(full_payload(self.learner, self.version, lineage=self._lineage))
        return self._store.publish_base(payload, self.manifests[self.version])

    def assert_scores(self, model: Any, version: int) -> None:
        """The model scores bit for bit as the version's weights do."""
        np.testing.assert_array_equal(model.score(self.ids, self._numerics), self.scores[version])

    @property
    def _numerics(self) -> F32:
        return np.zeros((len(self.ids), 0), np.float32)


def four_versions(store: SnapshotStore) -> Chain:
    """A chain of versions 1 (full) to 4."""
    chain = Chain(store)
    chain.publish("full")
    for _ in range(3):
        chain.publish()
    return chain


def loaded(payload: bytes, before: Any = None) -> Any:
    """The model of one payload, as the scorer makes it."""
    return load_table_model([read_payload([payload], len(payload))], SCHEMA, before)
