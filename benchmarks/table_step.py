"""The table's part of a training step, beside that of before, and whole steps with a large and a small table.

33 id fields × 16 and 8 tasks, so a row has 33 floats. Each field has ids of its own, an equal share of all rows. Ids
are drawn with heavy-tailed popularity: the one of rank V·u³, u uniform; ``uniform`` draws all alike.

Letters: B instances, W id fields, D embedding width, T tasks, U distinct rows of a batch.
"""

import time
from collections.abc import Callable
from statistics import mean, median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.table_before import (
    DistinctBefore,
    IdMapBefore,
    WeightsBefore,
    read_cells,
    readers,
    square_sum,
)
from smes.arrays import I64
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.id_table import IdTable
from smes.model.learner import Learner
from smes.schema import Feature, Schema, Task

BATCH, FIELDS, DIM, TASKS = 1024, 33, 16, 8
FLOATS = DIM + 1 + 2 * TASKS  # of a row: weights and accumulators
SCHEMA = Schema("tables", tuple(Task(f"t{i}") for i in range(TASKS)), tuple(Feature(f"f{i}") for i in range(2, FIELDS)))
_CPU = torch.device("cpu")
_T = TypeVar("_T")
_MODEL, _OPTIMIZER = ModelConfig(embedding_dim=DIM), OptimizerConfig()


def ids_by_block(rows: int, size: int = BATCH) -> list[I64]:
    """Blocks of ids, int64 [at most ``size``, W], in which every id of every field occurs once."""
    of_field = max(1, rows // FIELDS)
    return [
        np.repeat(np.arange(start, min(start + size, of_field))[:, None], FIELDS, 1)
        for start in range(0, of_field, size)
    ]


def draw(rows: int, batches: int, power: int, seed: int) -> list[I64]:
    """Batches of ids, int64 [B, W] each."""
    rng = np.random.default_rng(seed)
    of_field = max(1, rows // FIELDS)
    return [(rng.random((BATCH, FIELDS)) ** power * of_field).astype(np.int64) for _ in range(batches)]


def filled_table(rows: int) -> IdTable:
    """A table in which every id has its row."""
    table = IdTable(SCHEMA, _MODEL, _OPTIMIZER, None, _CPU, seed=0)
    for ids in ids_by_block(rows):
        table.assign(ids, 0)
    table.skip_delta()
    return table


class TableNow:
    """The table's part of a step as it is.

    Args:
        table: Filled.
    """

    def __init__(self, table: IdTable) -> None:
        self._table = table
        self._gradients = _gradients()

    def step(self, ids_BW: I64) -> None:
        batch = self._table.assign(ids_BW, 0)
        rows_U, cells_BW = torch.from_numpy(batch.rows_U), torch.from_numpy(batch.cells_BW)
        records = self._table.records
        cells = records.cells(rows_U, cells_BW)
        torch.autograd.backward(_pooled(cells.values["embedding"], cells.values["wide"]), self._gradients)
        gradients = records.gradients(len(rows_U), cells, torch.tensor(float(BATCH)))
        assert gradients.square.isfinite()
        records.update(rows_U, gradients)


class TableBefore:
    """The same by the operations of before.

    Args:
        table: Whose ids and weights are copied.

    Attributes:
        tables: By group of columns, in the order of the table's rows.
    """

    def __init__(self, table: IdTable) -> None:
        self._ids, self._gradients = table.rows.ids, _gradients()
        self._map = IdMapBefore()
        keys = table.rows.keys(np.arange(table.records.num_rows))
        for start in range(0, len(keys), 100_000):
            self._map.insert(keys[start : start + 100_000])
        self._distinct = DistinctBefore(len(keys))
        weights = table.records.values(np.arange(len(keys)))
        # In torch's memory, as they were: NumPy's lies in huge pages, torch's does not.
        self.tables = {
            name: WeightsBefore(torch.from_numpy(weights[name]).clone(), rule)
            for name, rule in (("embedding", _OPTIMIZER.embedding), ("wide", _OPTIMIZER.wide))
        }

    def step(self, ids_BW: I64) -> None:
        found_U, place_BW = self._distinct(self._map.insert(self._ids.own(ids_BW)).reshape(ids_BW.shape))
        order, start_U = (torch.from_numpy(array) for array in readers(place_BW.ravel(), len(found_U)))
        rows_U, cells_BW = torch.from_numpy(found_U), torch.from_numpy(place_BW)
        leaves = [table.gather(rows_U) for table in self.tables.values()]
        embedding, wide = (read_cells(leaf, cells_BW, order, start_U) for leaf in leaves)
        torch.autograd.backward(_pooled(embedding, wide), self._gradients)
        scale = torch.tensor(float(BATCH))
        assert torch.stack([square_sum(leaf, scale) for leaf in leaves]).sum().isfinite()
        for table, leaf in zip(self.tables.values(), leaves, strict=True):
            table.update(rows_U, leaf, scale)


def _pooled(embedding_BWD: Tensor, wide_BWT: Tensor) -> list[Tensor]:
    """What a ranker reads of id features, and their sum in the linear part."""
    return [embedding_BWD.reshape(BATCH, -1), wide_BWT.sum(dim=1)]


def _gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [1e-4 * torch.randn(BATCH, n, generator=generator) for n in (FIELDS * DIM, TASKS)]


def compare_table_part(rows: int, rounds: int, steps: int) -> dict[str, float]:
    """``fused_vs_ops`` and what it is made of, for both popularities."""
    table = filled_table(rows)
    now, before = TableNow(table), TableBefore(table)
    result: dict[str, float] = {}
    for name, power in (("", 3), ("_uniform", 1)):
        batches = draw(rows, 64, power, seed=power)
        seconds = _rounds({"now": now.step, "before": before.step}, batches, batches, rounds, steps)
        result[f"distinct_rows{name}"] = mean(len(np.unique(table.rows.find(ids))) for ids in batches[:8])
        result[f"table_part_ms{name}"] = median(seconds["now"]) * 1e3
        result[f"table_part_before_ms{name}"] = median(seconds["before"]) * 1e3
        ratios = [b / n for b, n in zip(seconds["before"], seconds["now"], strict=True)]
        result[f"fused_vs_ops{name}"] = median(ratios)
    return result


def filled_learner(rows: int) -> Learner:
    """The default model with a table in which every id has its row."""
    learner = Learner(SCHEMA, _MODEL, _OPTIMIZER, device=_CPU)
    for ids in ids_by_block(rows):
        learner.prepare(_examples(ids))
    return learner


def compare_steps(large: int, small: int, rounds: int, steps: int) -> dict[str, float]:
    """``step_10m_vs_10k`` and what it is made of."""
    learners = {"large": filled_learner(large), "small": filled_learner(small)}
    blocks = {
        name: [_examples(ids) for ids in draw(rows, 64, 3, seed=1)]
        for name, rows in (("large", large), ("small", small))
    }

    def stepper(learner: Learner) -> Callable[[ExampleBlock], object]:
        return lambda block: learner.step(learner.prepare(block))

    steppers = {name: stepper(learner) for name, learner in learners.items()}
    seconds = _rounds(steppers, blocks["large"], blocks["small"], rounds, steps)
    return {
        "step_large_ms": median(seconds["large"]) * 1e3,
        "step_small_ms": median(seconds["small"]) * 1e3,
        "step_10m_vs_10k": median(a / b for a, b in zip(seconds["large"], seconds["small"], strict=True)),
    }


def _examples(ids_BW: I64) -> ExampleBlock:
    block = ExampleBlock.empty(SCHEMA, len(ids_BW))
    block.ids[:] = ids_BW
    block.labels[:] = np.random.default_rng(2).random(block.labels.shape) < 0.1
    block.label_mask[:] = True
    return block


def _rounds(
    steppers: dict[str, Callable[[_T], object]], first: list[_T], second: list[_T], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds a step of two contenders that take turns, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(-1, rounds):  # the first one warms up
        for (name, step), batches in zip(steppers.items(), (first, second), strict=True):
            start = time.perf_counter()
            for n in range(steps):
                step(batches[(turn * steps + n) % len(batches)])
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / steps)
    return seconds
