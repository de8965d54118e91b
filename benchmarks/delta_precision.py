"""What half precision and 8-bit rows cost in AUC: the same weights serve in each precision, beside each other.

A learner trains on a log as ``smes backtest`` does. Over the last part of the log, its weights are copied every few
batches, and every batch is scored by the copy in each precision before it is trained on: what a scorer would answer.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import get_args

import numpy as np
import torch

from feature_store.payload import Precision, rounded
from simulators.synthetic import synthesize
from smes.events import ExampleBlock
from smes.metrics import BinaryTally
from smes.model.frozen_model import FrozenModel
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes_cli.backtest import run_backtest
from smes_cli.config import Config
from trainer.evaluation import ProgressiveEvaluation

_COPY_EVERY = 20  # batches
_SCORED_SHARE = 0.5  # of the log, its end
_PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def precision_losses(log: Path | None, impressions: int) -> dict[str, float]:
    """``auc_fp32``, ``auc_loss_fp16``, ``auc_loss_int8``, and ``row_bytes`` of each, key included.

    Args:
        log: A folder that ``smes backtest`` reads; None for the built-in synthetic log.
        impressions: How many of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        if log is None:
            log = Path(folder) / "log.parquet"
            synthesize(log, impressions, seed=0)
        kept: list[ScoredInPrecisions] = []

        def evaluate(config: Config, learner: Learner) -> ProgressiveEvaluation:
            kept.append(ScoredInPrecisions(config, learner, round((1 - _SCORED_SHARE) * impressions)))
            return kept[0]

        run_backtest(
            Config(), log, limit=impressions, seed=0, baseline=None, should_stop=lambda: False, evaluate=evaluate
        )
    return kept[0].result()


class ScoredInPrecisions(ProgressiveEvaluation):
    """Scores the end of a log with copies of the weights whose rows are rounded.

    Args:
        config: Window bounds.
        learner: The weights.
        skip: Impressions before the first that is scored.
    """

    def __init__(self, config: Config, learner: Learner, skip: int) -> None:
        super().__init__(
            learner.schema,
            config.trainer.evaluation,
            freeze=lambda: FrozenModel.freeze(learner),
            thaw=lambda state: FrozenModel.thaw(learner, state),
        )
        self._learner, self._left, self._batches = learner, skip, 0
        self._tasks = [(t, task.name) for t, task in enumerate(learner.schema.tasks) if task.kind == "binary"]
        self._scores = {p: {name: BinaryTally() for _, name in self._tasks} for p in _PRECISIONS}
        self._models: dict[Precision, ServingModel] = {}
        self._columns: Mapping[str, int] = {}

    def before_step(self, examples: ExampleBlock) -> None:
        """Score a batch in each precision, if it is late enough."""
        super().before_step(examples)
        self._left -= len(examples)
        if self._left > 0:
            return
        if self._batches % _COPY_EVERY == 0:
            self._copy()
        self._batches += 1
        for precision, model in self._models.items():
            scores = model.score(examples.ids, examples.numerics)
            for t, name in self._tasks:
                rows = examples.label_mask[:, t]
                self._scores[precision][name].add(scores[rows, t], examples.labels[rows, t])

    def _copy(self) -> None:
        state = self._learner.serving_state()
        tables = {n: t.numpy() for n, t in state.items() if n.startswith("table.") and n != "table.keys"}
        self._columns = {name: table.shape[1] for name, table in tables.items()}
        for precision in _PRECISIONS:
            changed = {name: torch.from_numpy(rounded(table, precision)) for name, table in tables.items()}
            self._models[precision] = ServingModel.from_state(
                self._learner.schema, self._learner.config, {**state, **changed}
            )

    def result(self) -> dict[str, float]:
        """The flat figures."""
        auc = {p: [tally.report().auc for tally in tallies.values()] for p, tallies in self._scores.items()}
        defined = np.isfinite(auc["fp32"])
        result = {"auc_fp32": mean(np.array(auc["fp32"])[defined].tolist())}
        floats, groups = sum(self._columns.values()), len(self._columns)
        result["row_bytes_fp32"] = 8.0 + 4 * floats
        bytes_of: dict[Precision, int] = {"fp16": 8 + 2 * floats, "int8": 8 + floats + 4 * groups}
        for precision, row_bytes in bytes_of.items():
            losses = (np.array(auc["fp32"]) - np.array(auc[precision]))[defined]
            result[f"auc_loss_{precision}"] = float(losses.mean())
            result[f"auc_loss_{precision}_max"] = float(losses.max())
            result[f"row_bytes_{precision}"] = float(row_bytes)
        return result
