"""A large table whose versions show in its scores: what :mod:`benchmarks.swaps` publishes and asks for.

Every delta rewrites the rows of all ids that are asked for, and some at random, and moves the dense weights. So two
versions never give the same scores, and an answer that mixes two gives those of neither.

Letters: R rows, Q requests, N items of a request, T tasks.
"""

import json
from collections.abc import Iterator

import numpy as np
import torch

from feature_store.payload import Block, write_payload
from feature_store.pieces import Payload
from smes.arrays import F32, I64
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.ids import IdKeys
from smes.model.learner import Learner
from smes.model.serving import ServingModel, group_columns
from smes.schema import Feature, Schema, Task

REQUESTS, ITEMS = 8, 100
_BLOCK_ROWS = 65_536
_CONTEXT = 31
_FIRST_ITEM = 10**9


class SwapWorld:
    """The weights of each version.

    Args:
        rows: R.
        seed: Of everything.

    Attributes:
        schema: 8 tasks, 33 id fields.
        model: Its default model.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        tasks = tuple(Task(f"task{i}") for i in range(8))
        self.schema = Schema("swaps", tasks=tasks, features=tuple(Feature(f"field{i}", "id") for i in range(_CONTEXT)))
        self.model = ModelConfig()
        self._groups = group_columns(self.schema, self.model)
        learner = Learner(self.schema, self.model, OptimizerConfig(), device=torch.device("cpu"), seed=seed)
        self._dense = learner.dense_serving_state()
        rng = np.random.default_rng(seed)
        required = IdKeys(self.schema).required
        asked = np.unique(IdKeys(self.schema).own(np.concatenate([self.ids(q) for q in range(REQUESTS)])))
        others = rng.integers(-(2**63), 2**63 - 1, max(0, rows - len(required) - len(asked)))
        self._fixed: I64 = np.setdiff1d(others, np.concatenate([asked, required]))
        self._asked: I64 = np.setdiff1d(asked, required)
        self._required = required
        self._random: dict[str, F32] = {
            name: rng.normal(0, 0.1, (_BLOCK_ROWS, columns)).astype(np.float32)
            for name, columns in self._groups.items()
        }
        self._seed = seed

    @property
    def weights_bytes(self) -> int:
        """Bytes of the serving weights: what a full payload in fp32 holds."""
        return self.full("a", 0).total_bytes

    def ids(self, request: int) -> I64:
        """The ids of a request's instances. int64 [N, W]."""
        ids = np.empty((ITEMS, self.schema.id_width), np.int64)
        ids[:, 0] = request
        ids[:, 1] = self.items(request)
        ids[:, 2:] = np.arange(_CONTEXT)
        return ids

    def items(self, request: int) -> list[int]:
        """The items of a request."""
        return list(range(_FIRST_ITEM + request * ITEMS, _FIRST_ITEM + request * ITEMS + ITEMS))

    def body(self, request: int) -> bytes:
        """A request's JSON."""
        context = {f"field{i}": i for i in range(_CONTEXT)}
        return json.dumps({"user_id": request, "items": self.items(request), "context": context}).encode()

    def full(self, lineage: str, version: int) -> Payload:
        """All weights of a version."""
        count = len(self._required) + len(self._asked) + len(self._fixed)

        def blocks() -> Iterator[Block]:
            yield self._required, self._values(self._required, 0)
            yield self._asked, self._values(self._asked, version)
            for start in range(0, len(self._fixed), _BLOCK_ROWS):
                keys = self._fixed[start : start + _BLOCK_ROWS]
                yield keys, {name: values[: len(keys)] for name, values in self._random.items()}

        return write_payload(self._marks(lineage, version), self.dense(version), self._groups, count, blocks)

    def delta(self, lineage: str, version: int, rows: int) -> Payload:
        """What changes in a version: so many rows, those of the ids that are asked for included."""
        more = min(max(0, rows - len(self._asked)), len(self._fixed))
        start = int(np.random.default_rng([self._seed, version]).integers(len(self._fixed) - more + 1))
        some = self._fixed[start : start + more]
        keys = np.concatenate([self._asked, some])
        asked = self._values(self._asked, version)
        columns = {
            name: np.concatenate([asked[name], np.resize(values, (len(some), values.shape[1]))])
            for name, values in self._random.items()
        }
        gone = np.zeros(0, np.int64)
        marks = self._marks(lineage, version)
        payload = write_payload(
            marks, self.dense(version), self._groups, len(keys), lambda: [(keys, columns)], removed=gone
        )
        return Payload.of(payload.joined())

    def dense(self, version: int) -> dict[str, torch.Tensor]:
        """The dense weights of a version."""
        moved = "dense.heads.out_bias"
        return {**self._dense, moved: self._dense[moved] + 0.01 * (version % 37)}

    def scores(self, version: int) -> F32:
        """What each request must be answered. float32 [Q, N, T]."""
        keys = np.concatenate([self._required, self._asked])
        parts = self._values(self._required, 0), self._values(self._asked, version)
        state = {f"table.{n}": torch.from_numpy(np.concatenate([part[n] for part in parts])) for n in self._groups}
        state |= {"table.keys": torch.from_numpy(keys), **self.dense(version)}
        model = ServingModel.from_state(self.schema, self.model, state)
        numerics = np.zeros((ITEMS, 0), np.float32)
        return np.stack([model.score(self.ids(request), numerics) for request in range(REQUESTS)])

    def _values(self, keys: I64, version: int) -> dict[str, F32]:
        """Rows of a version, at random."""
        rng = np.random.default_rng([self._seed, version, 1])
        return {n: rng.normal(0, 0.3, (len(keys), c)).astype(np.float32) for n, c in self._groups.items()}

    def _marks(self, lineage: str, version: int) -> dict[str, str]:
        return {
            "schema_hash": self.schema.hash,
            "model": json.dumps(self.model.to_dict()),
            "lineage": lineage,
            "version": str(version),
        }
