"""Metrics of weights that stay as they are, on examples with final labels.

The metrics, and the groups of the GAUC, are those of :mod:`trainer.evaluation`, so that the two can be compared. Here
the first window counts, too: its weights have learned already.
"""

import numpy as np

from smes.arrays import F32, I64, Arrays
from smes.events import ExampleBlock
from smes.model.serving import ServingModel
from smes.schema import Schema
from trainer.config import EvaluationConfig
from trainer.evaluation import ProgressiveEvaluation, TaskMetrics
from trainer.observers import StepFigures


class FrozenEvaluation:
    """Metrics of one model, in bounded memory.

    Attributes:
        impressions: How many were scored.

    Args:
        model: Scores.
        schema: Its schema.
        config: Window bounds.
    """

    def __init__(self, model: ServingModel, schema: Schema, config: EvaluationConfig) -> None:
        self._scores = _Kept(model)
        self._evaluation = ProgressiveEvaluation(
            schema,
            config,
            freeze=lambda: self._scores,
            thaw=self._no_state,
            first_window_counts=True,
            scored_together=1,  # what follows takes the scores of each batch
        )
        self.impressions = 0

    def add(self, examples: ExampleBlock) -> None:
        """Score examples that are ``WHOLE``, and count them."""
        # What another version scored once does not count here.
        served = np.full_like(examples.served_scores, np.nan)
        examples = ExampleBlock(**(examples.arrays() | {"served_scores": served}))
        self._evaluation.before_step(examples)
        self._evaluation.after_step(examples, StepFigures(scores=self._scores.take()))
        self.impressions += len(examples)

    def report(self) -> dict[str, TaskMetrics]:
        """Metrics by task name."""
        return self._evaluation.report()

    def _no_state(self, state: Arrays) -> "_Kept":
        raise AssertionError("a frozen evaluation has no state")


class _Kept:
    """Scores every example once, and keeps the scores until they are taken."""

    def __init__(self, model: ServingModel) -> None:
        self._model = model
        self._scores: list[F32] = []

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        scores = self._model.score(ids, numerics, now_ms)
        self._scores.append(scores)
        return scores

    def take(self) -> F32:
        """The scores since the last time, in their order."""
        taken, self._scores = np.concatenate(self._scores), []
        return taken

    def state(self) -> Arrays:
        return {}

    def close(self) -> None:
        """Nothing to release."""
