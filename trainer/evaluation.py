"""Progressive evaluation: every example is scored before it is trained on.

AUC, NE and calibration come from the scores of the weights just before each step. GAUC is windowed: a window is a part
of the stream that one frozen copy of the weights scores, taken at the window's start. Weights that adapt to a user's
own labels would bias a pooled GAUC within that user downwards. The group is the request where the log has one, else
(user, window). The first window does not count, because its weights have seen nothing. Where an impression carries the
score that it was served with, that score counts instead of ours.

Within a group, nothing may change that the group's own labels can influence: neither the weights nor the user's
history. So windows lie within fixed periods of event time, as those of the schema's history do
(:attr:`smes.schema.History.window_s`); by default they are the same. A length that would let a window reach over the
end of one of the history's windows is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from smes.arrays import F32, I64, Arrays, Bool, prefixed, under
from smes.events import ExampleBlock
from smes.metrics import BinaryTally, RegressionTally, group_auc
from smes.schema import MISSING, Schema
from trainer.config import EvaluationConfig
from trainer.observers import Observer, StepFigures

_FIRST_WINDOW_EXAMPLES = 1024
_DAY_S = 86_400.0
_PLAIN_WINDOW, _LARGEST_WINDOW = 16_384, 262_144


@dataclass(frozen=True, slots=True)
class TaskMetrics:
    """Metrics of one task; None where undefined or not defined for its kind of task.

    Attributes:
        examples: Labelled examples scored.
        positives: How many of them have a positive label (regression: above 0).
        base_rate: Their share, 0 … 1; binary tasks only.
        auc, ne, ece, calibration: See :class:`smes.metrics.BinaryReport`; binary tasks only.
        gauc_windowed: AUC within (request or user, window), averaged with impressions as weights; binary tasks only.
        xauc, mae, mean_bias: See :class:`smes.metrics.RegressionTally`: share of pairs ordered as their labels, mean
            absolute error, mean prediction minus mean label, both in the label's unit; regression tasks only.
        not_scored: Examples without a finite score. One of them makes the metrics that it belongs to undefined.
    """

    examples: int
    positives: int
    base_rate: float | None = None
    auc: float | None = None
    gauc_windowed: float | None = None
    ne: float | None = None
    ece: float | None = None
    calibration: float | None = None
    xauc: float | None = None
    mae: float | None = None
    mean_bias: float | None = None
    not_scored: int = 0


class FrozenModel(Protocol):
    """Scores with weights that never change."""

    def score(self, ids: I64, numerics: F32) -> F32:
        """int64 [N, W], float32 [N, F] → float32 [N, T]."""


Tensors = Mapping[str, torch.Tensor]


class ProgressiveEvaluation(Observer):
    """Running metrics of every task, in bounded memory.

    Args:
        schema: Features and tasks.
        config: Window bounds.
        freeze: Returns a copy of the present weights.
        build: Builds a frozen model from such a copy.

    Raises:
        ValueError: ``window_s`` is not a whole part of the schema's history window.
    """

    def __init__(
        self,
        schema: Schema,
        config: EvaluationConfig,
        *,
        freeze: Callable[[], Tensors],
        build: Callable[[Tensors], FrozenModel],
    ) -> None:
        self._schema, self._freeze, self._build = schema, freeze, build
        history = schema.history
        self._window_ms = round((config.window_s or (history.window_s if history else _DAY_S)) * 1000)
        if history and history.window_ms % self._window_ms:
            raise ValueError(
                f"EvaluationConfig.window_s: {config.window_s}, expected a whole part of the schema's "
                f"history.window_s {history.window_s:g}, so that no user's history changes within a group"
            )
        self._window_examples = config.window_examples or (_LARGEST_WINDOW if history else _PLAIN_WINDOW)
        self._tallies: list[BinaryTally | RegressionTally] = [
            BinaryTally() if task.kind == "binary" else RegressionTally() for task in schema.tasks
        ]
        self._frozen_tensors: Tensors = {}
        self._frozen: FrozenModel | None = None
        self._period = 0  # number of the period of event time that the open window lies in
        self._before_window = 0  # examples in closed windows
        self._window = _Window(schema.num_tasks)
        self._group_auc = np.zeros((schema.num_tasks, 2), np.float64)  # Σ weight · AUC, Σ weight of closed windows

    def before_step(self, examples: ExampleBlock) -> None:
        """Score a batch with the window's frozen weights; open a new window first where one is due.

        Where a period ends within the batch, a copy of the weights from before the whole batch scores the rest. That
        copy is as old as the start of the next window, or older.
        """
        period_B = examples.event_time_ms // self._window_ms
        for rows in np.split(np.arange(len(examples)), np.flatnonzero(np.diff(period_B)) + 1):
            part = examples.take(rows) if len(rows) < len(examples) else examples
            frozen = self._open_window(int(period_B[rows[0]]))
            scores = frozen.score(part.ids, part.numerics)
            self._window.add(part, _as_served(part, scores))

    def _open_window(self, period: int) -> FrozenModel:
        """The frozen model of the open window, or of a new one if the period is over or the window is full."""
        most = min(self._window_examples, max(_FIRST_WINDOW_EXAMPLES, self._before_window))
        if self._frozen is not None and period == self._period and len(self._window) < most:
            return self._frozen
        self._group_auc += self._counted()
        self._before_window += len(self._window)
        self._window = _Window(self._schema.num_tasks)
        self._period = period
        self._frozen_tensors = dict(self._freeze())
        self._frozen = self._build(self._frozen_tensors)
        return self._frozen

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Take the scores that the weights gave the batch just before they were trained on it."""
        scores = _as_served(examples, figures.scores)
        for t, tally in enumerate(self._tallies):
            rows = examples.label_mask[:, t]
            tally.add(scores[rows, t], examples.labels[rows, t])

    def _counted(self) -> NDArray[np.float64]:
        """What the open window adds to the GAUC of the closed ones."""
        group_auc_T2 = self._window.group_auc()
        return group_auc_T2 if self._before_window else np.zeros_like(group_auc_T2)

    def progressive(self) -> dict[str, TaskMetrics]:
        """Metrics so far by task name, without the GAUC: cheap enough for every cut."""
        metrics = {}
        for task, tally in zip(self._schema.tasks, self._tallies, strict=True):
            if isinstance(tally, RegressionTally):
                metrics[task.name] = TaskMetrics(
                    tally.examples,
                    tally.positives,
                    xauc=_defined(tally.xauc),
                    mae=_defined(tally.mean_absolute_error),
                    mean_bias=_defined(tally.mean_bias),
                    not_scored=tally.not_scored,
                )
                continue
            report = tally.report()
            metrics[task.name] = TaskMetrics(
                report.examples,
                report.positives,
                base_rate=report.positives / report.examples if report.examples else None,
                auc=_defined(report.auc),
                ne=_defined(report.ne),
                ece=_defined(report.ece),
                calibration=_defined(report.calibration),
                not_scored=report.not_scored,
            )
        return metrics

    def report(self) -> dict[str, TaskMetrics]:
        """Metrics so far by task name, the open window included."""
        metrics = self.progressive()
        group_auc_T2 = self._group_auc + self._counted()
        for task, (weighted, weight) in zip(self._schema.tasks, group_auc_T2, strict=True):
            if task.kind == "binary" and weight:
                metrics[task.name] = replace(metrics[task.name], gauc_windowed=_defined(weighted / weight))
        return metrics

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` continues, with the open window and its frozen weights."""
        state: Arrays = {"group_auc": self._group_auc, "window": np.array([self._period, self._before_window])}
        for t, tally in enumerate(self._tallies):
            state |= prefixed(f"{t}.", tally.state())
        state |= prefixed("window.", self._window.arrays())
        state |= prefixed("frozen.", {name: tensor.numpy() for name, tensor in self._frozen_tensors.items()})
        return state

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        for t, tally in enumerate(self._tallies):
            tally.load_state(under(f"{t}.", state))
        self._window = _Window(self._schema.num_tasks, under("window.", state))
        self._group_auc = state["group_auc"].copy()
        self._period, self._before_window = (int(n) for n in state["window"])
        frozen = under("frozen.", state)
        self._frozen_tensors = {name: torch.from_numpy(array) for name, array in frozen.items()}
        self._frozen = self._build(self._frozen_tensors) if self._frozen_tensors else None


class _Window:
    """The examples that one frozen copy scored."""

    def __init__(self, num_tasks: int, arrays: dict[str, NDArray[Any]] | None = None) -> None:
        shape = (0, num_tasks)
        self._empty: dict[str, NDArray[Any]] = {
            "group": np.zeros((0, 2), np.int64),  # is it a request; the request or user
            "scores": np.zeros(shape, np.float32),
            "labels": np.zeros(shape, np.float32),
            "mask": np.zeros(shape, np.bool_),
        }
        self._parts = [self._empty if arrays is None else arrays]

    def __len__(self) -> int:
        return sum(len(part["group"]) for part in self._parts)

    def add(self, examples: ExampleBlock, scores: F32) -> None:
        """Add scored examples. A score that is not finite makes the AUC of its group undefined."""
        has_request = examples.request_id != MISSING
        group = np.stack([has_request, np.where(has_request, examples.request_id, examples.user_id)], axis=1)
        mask: Bool = examples.label_mask
        self._parts.append({"group": group, "scores": scores, "labels": examples.labels, "mask": mask})

    def arrays(self) -> Arrays:
        """All columns."""
        merged = {name: np.concatenate([part[name] for part in self._parts]) for name in self._empty}
        self._parts = [merged]
        return merged

    def group_auc(self) -> NDArray[np.float64]:
        """(Σ examples · AUC, Σ examples) over the groups with both classes, per task. float64 [T, 2]."""
        arrays = self.arrays()
        totals = np.zeros((arrays["scores"].shape[1], 2))
        if len(arrays["group"]) == 0:
            return totals
        group = np.unique(arrays["group"], axis=0, return_inverse=True)[1].ravel().astype(np.int64)
        for t in range(len(totals)):
            rows = arrays["mask"][:, t]
            auc, examples, _ = group_auc(group[rows], arrays["scores"][rows, t], arrays["labels"][rows, t])
            totals[t] = (auc * examples).sum(), examples.sum()
        return totals


def _as_served(examples: ExampleBlock, scores: F32) -> F32:
    """The served score where the impression carries one, else the given one."""
    served: F32 = np.where(np.isnan(examples.served_scores), scores, examples.served_scores)
    return served


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
