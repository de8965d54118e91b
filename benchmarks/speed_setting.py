"""What every contender of the speed benchmark is given: the same fields, tasks, widths and data."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smes.arrays import F32, I64
from smes.schema import Feature, Schema, Task


@dataclass(frozen=True)
class Setting:
    """Sizes common to all contenders.

    Attributes:
        num_fields: Id fields an instance has, user and item among them; ≥ 2.
        embedding_dim: Width of an embedding.
        num_tasks: Binary tasks.
        expert_dims: Widths of an expert's layers, in the peers and in the paper's form of SMES.
        batch_size: Instances of a training step.
        candidates: Instances of a scoring call.
        vocabulary: Ids of each field. Small on purpose: the peers' optimisers walk their whole embedding tables
            at every step, ours only the rows that a batch touches, so that a realistic one would decide the comparison.
        num_batches: Distinct batches, cycled through.
        seed: Of the data.
        peer_learning_rate: Of the peers' Adam.
    """

    num_fields: int = 33
    embedding_dim: int = 16
    num_tasks: int = 8
    expert_dims: tuple[int, ...] = (128, 64)
    batch_size: int = 1024
    candidates: int = 500
    vocabulary: int = 1000
    num_batches: int = 8
    seed: int = 0
    peer_learning_rate: float = 1e-3

    @property
    def schema(self) -> Schema:
        """User, item and as many further fields as are missing; every other task of the group ``watch``."""
        tasks = tuple(Task(f"{'like' if i % 2 else 'view'}{i}") for i in range(self.num_tasks))
        return Schema("speed", tasks=tasks, features=tuple(Feature(f"field{i}") for i in range(2, self.num_fields)))


@dataclass(frozen=True)
class Batch:
    """Attributes: ids, int64 [B, fields] from 0 up; labels, float32 [B, T] of 0 and 1."""

    ids: I64
    labels: F32


@dataclass(frozen=True)
class Data:
    """Attributes: batches to train on; candidates, the ids of one scoring call."""

    batches: list[Batch]
    candidates: I64


@dataclass(frozen=True)
class Contender:
    """One model that trains and scores.

    Attributes:
        name: Prefix of its figures.
        what: One line for the table.
        train: Take a step on the n-th batch, counted around.
        score: Score the candidates once.
        parameters: Weights without embeddings.
    """

    name: str
    what: str
    train: Callable[[int], object]
    score: Callable[[], object]
    parameters: int


def make_data(setting: Setting) -> Data:
    """Random instances of heavy-tailed popularity, a tenth of the labels positive."""
    rng = np.random.default_rng(setting.seed)

    def ids(rows: int) -> I64:
        drawn: I64 = rng.zipf(1.2, (rows, setting.num_fields)) % setting.vocabulary
        return drawn

    def batch() -> Batch:
        labels = rng.random((setting.batch_size, setting.num_tasks)) < 0.1
        return Batch(ids(setting.batch_size), labels.astype(np.float32))

    return Data([batch() for _ in range(setting.num_batches)], ids(setting.candidates))
