"""What a table of many rows takes of memory, and whether a budget of rows bounds it. Each in a process of its own."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.table_step import FIELDS, FLOATS, SCHEMA, ids_by_block
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.devices import keep_freed_memory
from smes.model.id_table import IdTable
from smes.model.learner import Learner
from smes.model.rows_config import RowsConfig

_CPU = torch.device("cpu")
_BATCH = 1024
_STEPS_A_CUT = 40


def table_bytes(rows: int) -> dict[str, float]:
    """``table_bytes_ratio``: memory that the process took for a table with a budget, which keeps the rows' ages, over
    the bytes of the weights and accumulators."""
    return _in_process(_table_bytes, rows)


def budget_growth(new_ids: int, budget: int) -> dict[str, float]:
    """``budget_rss_growth_pct``: a trainer's memory after so many new ids have gone through a budget, with deltas taken
    along the way, against its memory when three times the budget had."""
    return _in_process(_budget_growth, new_ids, budget)


def _table_bytes(rows: int) -> dict[str, float]:
    def table(budget: int) -> IdTable:
        return IdTable(SCHEMA, ModelConfig(), OptimizerConfig(), RowsConfig(budget=budget), _CPU, seed=0)

    warm = table(100)
    for ids in ids_by_block(10_000):
        warm.assign(ids, 0)
    before = resident_bytes()
    filled = table(rows + FIELDS)
    for n, ids in enumerate(ids_by_block(rows)):
        filled.assign(ids, n * 1000)
    taken = resident_bytes() - before
    return {
        "table_rows": filled.records.num_rows,
        "table_bytes_a_row": taken / filled.records.num_rows,
        "table_bytes_ratio": taken / (filled.records.num_rows * FLOATS * 4),
    }


def _budget_growth(new_ids: int, budget: int) -> dict[str, float]:
    learner = Learner(SCHEMA, ModelConfig(), OptimizerConfig(), device=_CPU, rows=RowsConfig(budget=budget))
    block = ExampleBlock.empty(SCHEMA, _BATCH)
    block.label_mask[:] = True
    block.labels[:] = np.random.default_rng(0).random(block.labels.shape) < 0.1
    learner.take_delta()
    warm, most, seen, step = 0, 0, 0, 0
    while seen < new_ids:
        first = seen // FIELDS
        block.ids[:] = np.arange(first, first + _BATCH)[:, None]
        block.event_time_ms[:] = 1_700_000_000_000 + step * 25
        learner.step(learner.prepare(block))
        seen, step = seen + _BATCH * FIELDS, step + 1
        if step % _STEPS_A_CUT == 0:
            learner.take_delta()
            if seen >= 3 * budget:
                most = max(most, resident_bytes())
                warm = warm or most
    return {
        "budget_rows": learner.num_rows,
        "budget_new_ids": seen,
        "budget_rss_mb": most / 1e6,
        "budget_rss_growth_pct": 100 * (most / warm - 1),
    }


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def _in_process(measure: Callable[..., dict[str, float]], *arguments: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1, initializer=_prepare) as pool:
        return pool.apply(measure, arguments)


def _prepare() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
