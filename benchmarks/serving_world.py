"""A model of usual size with stored features, which both services of :mod:`benchmarks.serving` answer with.

Letters: N items of a request, R rows, T tasks.
"""

import json

import numpy as np
import torch

from feature_store.entities import EntityStore
from feature_store.payload import write_payload
from feature_store.pieces import Payload
from smes.arrays import F32, I64
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.ids import IdKeys
from smes.model.learner import Learner
from smes.model.serving import ServingModel, group_columns
from smes.schema import Feature, Schema, Task

USERS, ITEMS, VALUES = 2_000, 20_000, 1_000
_USER, _ITEM, _CONTEXT, _NUMBERS = 8, 12, 11, 4


def schema() -> Schema:
    """8 tasks; 33 id fields, of which the store holds 20 and a request brings 11; 4 numbers of the items."""
    features = [Feature(f"user{i}", "id", source="user") for i in range(_USER)]
    features += [Feature(f"item{i}", "id", source="item") for i in range(_ITEM)]
    features += [Feature(f"number{i}", "numeric", source="item") for i in range(_NUMBERS)]
    features += [Feature(f"context{i}", "id") for i in range(_CONTEXT)]
    return Schema("serving", tasks=tuple(Task(f"task{i}") for i in range(8)), features=tuple(features))


class ServingWorld:
    """Weights, stored features and requests, the same in every process.

    Args:
        seed: Of everything.

    Attributes:
        schema: See :func:`schema`.
        model: Its default model.
    """

    def __init__(self, seed: int = 0) -> None:
        self.schema, self.model, self._seed = schema(), ModelConfig(), seed
        self._groups = group_columns(self.schema, self.model)
        learner = Learner(self.schema, self.model, OptimizerConfig(), device=torch.device("cpu"), seed=seed)
        self._dense = learner.dense_serving_state()
        keys = IdKeys(self.schema)
        width = self.schema.id_width

        def own(count: int) -> I64:
            ids = np.repeat(np.arange(count), width).reshape(count, width)
            return keys.own(ids).reshape(count, width)

        parts = [own(USERS)[:, 0], own(ITEMS)[:, 1], own(VALUES)[:, 2:].ravel()]
        self._keys: I64 = np.unique(np.concatenate([keys.required, *parts]))

    def serving_model(self) -> ServingModel:
        """The model of version 1."""
        state = {f"table.{name}": torch.from_numpy(values) for name, values in self._columns(self._keys).items()}
        state |= {"table.keys": torch.from_numpy(self._keys), **self._dense}
        return ServingModel.from_state(self.schema, self.model, state)

    def payload(self, version: int, changed: int | None = None) -> Payload:
        """All weights, or a delta that changes so many rows."""
        keys = self._keys
        if changed is not None:
            keys = np.sort(np.random.default_rng([self._seed, version]).choice(keys, changed, replace=False))
        marks = {
            "schema_hash": self.schema.hash,
            "model": json.dumps(self.model.to_dict()),
            "lineage": "a",
            "version": str(version),
        }
        columns = self._columns(keys)
        removed = None if changed is None else np.zeros(0, np.int64)
        return write_payload(marks, self._dense, self._groups, len(keys), lambda: [(keys, columns)], removed=removed)

    def fill(self, store: EntityStore) -> None:
        """Write the stored features."""
        for entity, ids in (("user", np.arange(USERS)), ("item", np.arange(ITEMS))):
            store.put_many(entity, ids, self.stored(entity, ids))  # type: ignore[arg-type]

    def stored(self, entity: str, ids: I64) -> dict[str, I64 | F32]:
        """Stored features of entities: name → [N]."""
        columns: dict[str, I64 | F32] = {}
        for place, feature in enumerate(self.schema.features):
            if feature.source != entity or feature.name in ("user_id", "item_id"):
                continue
            values = (ids * 7919 + place * 104_729) % VALUES
            columns[feature.name] = (values / VALUES).astype(np.float32) if feature.kind == "numeric" else values
        return columns

    def bodies(self, count: int, items: int) -> list[bytes]:
        """The JSON of requests with N items each; some users and items come more often than others."""
        rng = np.random.default_rng([self._seed, items])
        out = []
        for _ in range(count):
            chosen = np.unique((ITEMS * rng.random(2 * items) ** 2).astype(np.int64))
            while len(chosen) < items:
                more = (ITEMS * rng.random(2 * items) ** 2).astype(np.int64)
                chosen = np.unique(np.concatenate([chosen, more]))
            context = {f"context{i}": int(rng.integers(VALUES)) for i in range(_CONTEXT)}
            user = int(USERS * rng.random() ** 2)
            listed = rng.permutation(chosen)[:items].tolist()
            out.append(json.dumps({"user_id": user, "items": listed, "context": context}).encode())
        return out

    def _columns(self, keys: I64) -> dict[str, F32]:
        rng = np.random.default_rng([self._seed, len(keys)])
        return {n: rng.normal(0, 0.1, (len(keys), c)).astype(np.float32) for n, c in self._groups.items()}
