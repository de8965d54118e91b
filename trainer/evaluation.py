"""Progressive evaluation: every example is scored before it is trained on.

AUC, NE and calibration come from the scores of the weights as they are just before each step. GAUC is windowed: a
window is a stretch of the stream scored by one frozen copy of the weights, taken at its start, because within a user
weights that adapt to that user's own labels bias a pooled GAUC downwards. The group is the request where the log has
one, else (user, window). The first window, whose weights have seen nothing, does not count. Where an impression carries
the score that it was served with, that score is the one that counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from smes.events import F32, I64, Bool, ExampleBlock
from smes.metrics import BinaryTally, RegressionTally, group_auc
from smes.schema import MISSING, Schema

_FIRST_WINDOW_EXAMPLES = 1024


@dataclass(frozen=True)
class EvaluationConfig:
    """Windows of frozen weights.

    Attributes:
        window_s: Longest stretch of event time scored by one frozen copy, seconds, > 0.
        window_examples: Most examples in it, ≥ 1; bounds memory. Early windows are shorter: none is longer than all
            that was trained on before it began.
    """

    window_s: float = 86_400.0
    window_examples: int = 16_384

    def __post_init__(self) -> None:
        if not self.window_s > 0:
            raise ValueError(f"window_s {self.window_s}, expected more than 0 seconds")
        if self.window_examples < 1:
            raise ValueError(f"window_examples {self.window_examples}, expected at least 1")


@dataclass(frozen=True, slots=True)
class TaskMetrics:
    """Metrics of one task; None where undefined or not of its kind.

    Attributes:
        examples: Labelled examples scored.
        positives: Of these, with a positive label (regression: above 0).
        auc, ne, ece, calibration: See :class:`smes.metrics.BinaryReport`; binary tasks only.
        gauc_windowed: AUC within (request or user, window), averaged with impressions as weights; binary tasks only.
        xauc: Share of pairs ordered as their labels; regression tasks only.
    """

    examples: int
    positives: int
    auc: float | None = None
    gauc_windowed: float | None = None
    ne: float | None = None
    ece: float | None = None
    calibration: float | None = None
    xauc: float | None = None


class FrozenModel(Protocol):
    """Weights that stay as they are."""

    def score(self, ids: I64, numerics: F32) -> F32:
        """int64 [N, W], float32 [N, F] → float32 [N, T]."""


Tensors = Mapping[str, torch.Tensor]


class ProgressiveEvaluation:
    """Running metrics of every task, in bounded memory.

    Args:
        schema: Features and tasks.
        config: Window bounds.
        freeze: Gives a copy of the weights as they are now.
        build: Builds a frozen model of such a copy.
    """

    def __init__(
        self,
        schema: Schema,
        config: EvaluationConfig,
        *,
        freeze: Callable[[], Tensors],
        build: Callable[[Tensors], FrozenModel],
    ) -> None:
        self._schema, self._config, self._freeze, self._build = schema, config, freeze, build
        self._tallies: list[BinaryTally | RegressionTally] = [
            BinaryTally() if task.kind == "binary" else RegressionTally() for task in schema.tasks
        ]
        self._frozen_tensors: Tensors = {}
        self._frozen: FrozenModel | None = None
        self._window_start_ms = 0
        self._before_window = 0  # examples in closed windows
        self._window = _Window(schema.num_tasks)
        self._group_auc = np.zeros((schema.num_tasks, 2), np.float64)  # Σ weight · AUC, Σ weight of closed windows

    def before_step(self, examples: ExampleBlock) -> None:
        """Score a batch with the window's frozen weights, opening a new window first where one is due."""
        start_ms = int(examples.event_time_ms[0])
        too_long = start_ms >= self._window_start_ms + round(self._config.window_s * 1000)
        most = min(self._config.window_examples, max(_FIRST_WINDOW_EXAMPLES, self._before_window))
        if self._frozen is None or too_long or len(self._window) >= most:
            self._group_auc += self._counted()
            self._before_window += len(self._window)
            self._window = _Window(self._schema.num_tasks)
            self._window_start_ms = start_ms
            self._frozen_tensors = dict(self._freeze())
            self._frozen = self._build(self._frozen_tensors)
        scores = self._frozen.score(examples.ids, examples.numerics)
        self._window.add(examples, _as_served(examples, scores))

    def after_step(self, examples: ExampleBlock, scores: F32) -> None:
        """Take the scores [B, T] that the weights gave the batch just before they were trained on it."""
        scores = _as_served(examples, scores)
        for t, tally in enumerate(self._tallies):
            rows = examples.label_mask[:, t]
            tally.add(scores[rows, t], examples.labels[rows, t])

    def _counted(self) -> NDArray[np.float64]:
        """What the open window adds to the GAUC of the closed ones."""
        group_auc_T2 = self._window.group_auc()
        return group_auc_T2 if self._before_window else np.zeros_like(group_auc_T2)

    def progressive(self) -> dict[str, TaskMetrics]:
        """Metrics so far by task name, but for the GAUC: cheap enough for every cut."""
        metrics = {}
        for task, tally in zip(self._schema.tasks, self._tallies, strict=True):
            if isinstance(tally, RegressionTally):
                metrics[task.name] = TaskMetrics(tally.examples, tally.positives, xauc=_defined(tally.xauc))
                continue
            report = tally.report()
            metrics[task.name] = TaskMetrics(
                report.examples,
                report.positives,
                auc=_defined(report.auc),
                ne=_defined(report.ne),
                ece=_defined(report.ece),
                calibration=_defined(report.calibration),
            )
        return metrics

    def report(self) -> dict[str, TaskMetrics]:
        """Metrics so far by task name, the open window included."""
        metrics = self.progressive()
        group_auc_T2 = self._group_auc + self._counted()
        for task, (weighted, weight) in zip(self._schema.tasks, group_auc_T2, strict=True):
            if task.kind == "binary" and weight:
                metrics[task.name] = replace(metrics[task.name], gauc_windowed=float(weighted / weight))
        return metrics

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state` goes on, the open window and its frozen weights included."""
        state = {f"{t}.{k}": v for t, tally in enumerate(self._tallies) for k, v in tally.state().items()}
        state |= {f"window.{name}": array for name, array in self._window.arrays().items()}
        state |= {f"frozen.{name}": tensor.numpy() for name, tensor in self._frozen_tensors.items()}
        state["group_auc"] = self._group_auc
        state["window"] = np.array([self._window_start_ms, self._before_window])
        return state

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`."""

        def part(prefix: str) -> dict[str, NDArray[Any]]:
            return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}

        for t, tally in enumerate(self._tallies):
            tally.load_state(part(f"{t}."))
        self._window = _Window(self._schema.num_tasks, part("window."))
        self._group_auc = state["group_auc"].copy()
        self._window_start_ms, self._before_window = (int(n) for n in state["window"])
        self._frozen_tensors = {name: torch.from_numpy(array) for name, array in part("frozen.").items()}
        self._frozen = self._build(self._frozen_tensors) if self._frozen_tensors else None


class _Window:
    """What one frozen copy scored."""

    def __init__(self, num_tasks: int, arrays: dict[str, NDArray[Any]] | None = None) -> None:
        shape = (0, num_tasks)
        self._empty: dict[str, NDArray[Any]] = {
            "group": np.zeros((0, 2), np.int64),
            "scores": np.zeros(shape, np.float32),
            "labels": np.zeros(shape, np.float32),
            "mask": np.zeros(shape, np.bool_),
        }
        self._parts = [self._empty if arrays is None else arrays]

    def __len__(self) -> int:
        return sum(len(part["group"]) for part in self._parts)

    def add(self, examples: ExampleBlock, scores: F32) -> None:
        has_request = examples.request_id != MISSING
        group = np.stack([has_request, np.where(has_request, examples.request_id, examples.user_id)], axis=1)
        mask: Bool = examples.label_mask
        self._parts.append({"group": group, "scores": scores, "labels": examples.labels, "mask": mask})

    def arrays(self) -> dict[str, NDArray[Any]]:
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
