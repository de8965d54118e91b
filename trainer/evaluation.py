"""Progressive evaluation: every impression is scored before it is trained on.

AUC, NE and calibration come from the scores of the weights just before each step. GAUC is windowed: a window is a part
of the stream that one frozen copy of the weights scores, taken at the window's start. Weights that adapt to a user's
own labels would bias a pooled GAUC within that user downwards. The group is the request where the log has one, else
(user, window). The first window does not count, because its weights have seen nothing. Where an impression carries the
score that our own arm served it with, that score counts instead of ours.

An impression that is trained on before its labels are final counts once: with the scores from before its first
training, when its longest window has closed, with its final labels.

Within a group, nothing may change that the group's own labels can influence: neither the weights nor the user's
history. So windows lie within fixed periods of event time, as those of the schema's history do
(:attr:`smes.schema.History.window_s`); by default they are the same. A length that would let a window reach over the
end of one of the history's windows is refused.

The frozen copy scores many examples at once, when a thousand wait (:mod:`trainer.waiting_examples`).

Where rows are shared out among several ranks, there is no frozen copy. No impression is then ranked in a window, and
the windowed GAUC counts those of before alone.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from smes.arm_names import named
from smes.arrays import F32, F64, I64, Arrays, Bool, prefixed, under
from smes.events import WHOLE, ExampleBlock
from smes.metrics import BinaryTally, RegressionTally
from smes.schema import Schema
from trainer.config import EvaluationConfig
from trainer.observers import Observer, StepFigures
from trainer.ranked_windows import OpenImpressions, RankedWindow
from trainer.waiting_examples import SCORES, WAITING, BeingScored, WaitingExamples

_FIRST_WINDOW_EXAMPLES = 1024
_DAY_S = 86_400.0
_PLAIN_WINDOW, _LARGEST_WINDOW = 16_384, 262_144
_NOT_RANKED = -1  # in place of a window's number
_SCORED_TOGETHER = 1024  # twice as many cost a tenth less each, but are waited for twice as long


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

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        """float32 [N, T]; see :meth:`smes.model.serving.ServingModel.score`."""

    def state(self) -> Arrays:
        """Arrays of which the same model is made again; nothing writes to them any more."""

    def close(self) -> None:
        """Called when the model is not needed any more."""


class ProgressiveEvaluation(Observer):
    """Running metrics of every task, in bounded memory.

    Args:
        schema: Features and tasks.
        config: Window bounds.
        freeze: Makes a model of the present weights; None: no impression is ranked in a window.
        thaw: Makes the model again that a state was taken from, when the weights are those of the same moment; None
            where ``freeze`` is.
        first_window_counts: Whether the GAUC of the first window counts, because its weights have learned something.
        scored_together: So many examples of a window wait until they are scored together, ≥ 1. With 1, each batch is
            scored when it comes.
        start: Begins to score examples on another thread with a frozen model, whose rows are read at once; None: they
            are scored on this thread.

    Raises:
        ValueError: ``window_s`` is not a whole part of the schema's history window.
    """

    def __init__(
        self,
        schema: Schema,
        config: EvaluationConfig,
        *,
        freeze: Callable[[], FrozenModel] | None,
        thaw: Callable[[Arrays], FrozenModel] | None,
        first_window_counts: bool = False,
        scored_together: int = _SCORED_TOGETHER,
        start: Callable[[FrozenModel, ExampleBlock], Future[F32]] | None = None,
    ) -> None:
        self._schema, self._freeze, self._thaw = schema, freeze, thaw
        history = schema.history
        self._arm, self._first_counts = config.arm, first_window_counts
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
        self._frozen: FrozenModel | None = None
        self._period = 0  # number of the period of event time that the open window lies in
        self._before_window = 0  # impressions in closed windows
        self._window = RankedWindow(schema.num_tasks)
        self._unlabelled: dict[int, RankedWindow] = {}  # closed windows that wait for final labels, by number
        self._open = OpenImpressions(schema.num_tasks)
        self._waiting, self._scored_together = WaitingExamples(schema), scored_together
        self._start, self._being_scored = start, BeingScored(self._place)
        self._group_auc = np.zeros((schema.num_tasks, 2), np.float64)  # Σ weight · AUC, Σ weight of closed windows

    def before_step(self, examples: ExampleBlock) -> None:
        """Let the window's frozen weights score a batch, at once or later; open a new window first where one is due.

        Where a period ends within the batch, a copy of the weights from before the whole batch scores the rest. That
        copy is as old as the start of the next window, or older.
        """
        examples, whole = _beginning(examples)
        if self._freeze is None:
            if not whole:
                self._open.begin(examples.impression_id, _NOT_RANKED)
            return
        period_B = examples.event_time_ms // self._window_ms
        if not whole:  # an impression that was read late does not open an old period again
            period_B = np.maximum(period_B, self._period)
            period_B = np.maximum.accumulate(period_B)
        for rows in np.split(np.arange(len(examples)), np.flatnonzero(np.diff(period_B)) + 1):
            if len(rows) == 0:
                continue
            part = examples.take(rows) if len(rows) < len(examples) else examples
            self._open_window_if_due(int(period_B[rows[0]]))
            self._window.scored += len(part)
            self._waiting.add(part, whole=whole)
            if not whole:
                self._open.begin(part.impression_id, self._window.number)
            if len(self._waiting) >= self._scored_together:
                self._score_waiting()

    def _score_waiting(self) -> None:
        """Let the weights of the open window score what waits."""
        if not len(self._waiting):
            return
        examples, whole_N = self._waiting.all()
        self._waiting.clear()
        if self._start is None:
            self._place(self._frozen_scores(examples), examples, whole_N)
        else:
            self._being_scored.add(partial(self._start, self._open_frozen, examples), examples, whole_N)

    def _place(self, scores: F32, examples: ExampleBlock, whole_N: Bool) -> None:
        scores = self._as_served(examples, scores)
        if whole_N.any():
            self._window.add(examples.take(whole_N), scores[whole_N])
        self._open.score_frozen(examples.impression_id[~whole_N], scores[~whole_N])

    @property
    def _open_frozen(self) -> FrozenModel:
        assert self._frozen is not None, "what waits is scored before its window ends"
        return self._frozen

    def _frozen_scores(self, examples: ExampleBlock) -> F32:
        return self._open_frozen.score(examples.ids, examples.numerics, examples.event_time_ms)

    def _scores_of_waiting(self) -> F32:
        examples, _ = self._waiting.all()
        if not len(examples):
            return np.zeros((0, self._schema.num_tasks), np.float32)
        return self._as_served(examples, self._frozen_scores(examples))

    def _open_window_if_due(self, period: int) -> None:
        """Open a new window if there is none, if the period is over, or if the window is full."""
        most = min(self._window_examples, max(_FIRST_WINDOW_EXAMPLES, self._before_window))
        if self._frozen is not None and period == self._period and self._window.scored < most:
            return
        self._score_waiting()
        self._being_scored.finish()
        self._unlabelled[self._window.number] = self._window
        self._count_labelled()
        self._before_window += self._window.scored
        number, counts = self._window.number + 1, self._first_counts or self._before_window > 0
        self._window = RankedWindow(self._schema.num_tasks, number, counts=counts)
        self._period = period
        if self._frozen is not None:
            self._frozen.close()
        assert self._freeze is not None, "without it no window is opened"
        self._frozen = self._freeze()

    def reopen(self) -> None:
        """Open a new window before the next step: the weights are not those that the open one goes on from."""
        self._score_waiting()
        self._being_scored.finish()
        if self._frozen is not None:
            self._frozen.close()
            self._frozen = None

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Take the scores that the weights gave the batch just before they were trained on it."""
        beginning, whole = _beginning(examples)
        scores = self._as_served(beginning, figures.scores[examples.begins])
        if whole:
            self._tally(beginning, scores)
        else:
            self._open.score(beginning.impression_id, scores)

    def after_closing(self, examples: ExampleBlock) -> None:
        """Count impressions whose final labels have come, with their scores from before their first training."""
        if self._waiting.have_one_of(examples):
            self._score_waiting()
        if self._being_scored.have_open_ones():
            self._being_scored.finish()
        known, noted = self._open.close(examples)
        trained = noted["is_trained_on"]
        self._tally(known.take(trained), noted["scores"][trained])
        for number in np.unique(noted["window"]).tolist():
            if number == _NOT_RANKED:
                continue
            rows = noted["window"] == number
            window = self._window if number == self._window.number else self._unlabelled[number]
            window.add(known.take(rows), noted["frozen"][rows])
        self._count_labelled()

    def _as_served(self, examples: ExampleBlock, scores: F32) -> F32:
        """The served score where the impression carries one of our own arm, else the given one."""
        arms = examples.served_arm
        is_ours = ~arms.any(axis=1) | named(arms, self._arm)
        served: F32 = np.where(np.isnan(examples.served_scores) | ~is_ours[:, None], scores, examples.served_scores)
        return served

    def _tally(self, examples: ExampleBlock, scores: F32) -> None:
        for t, tally in enumerate(self._tallies):
            rows = examples.label_mask[:, t]
            tally.add(scores[rows, t], examples.labels[rows, t])

    def _count_labelled(self) -> None:
        """Count the closed windows whose impressions all have their final labels."""
        for number, window in list(self._unlabelled.items()):
            if window.labelled == window.scored:
                self._group_auc += self._unlabelled.pop(number).group_auc()

    def progressive(self) -> dict[str, TaskMetrics]:
        """Metrics so far by task name, without the GAUC: cheap enough for every cut."""
        return {task.name: _metrics(tally) for task, tally in zip(self._schema.tasks, self._tallies, strict=True)}

    @property
    def windows_closed(self) -> int:
        """How many windows are over, with all their final labels."""
        return max(0, self._window.number - len(self._unlabelled) - 1)  # number 0 is the empty one of the beginning

    def totals(self) -> Arrays:
        """What was counted so far, closed windows only, for :meth:`since`."""
        totals: Arrays = {"group_auc": self._group_auc.copy()}
        for t, tally in enumerate(self._tallies):
            totals |= prefixed(f"{t}.", tally.state())
        return totals

    def since(self, totals: Arrays, *, with_open: bool = False) -> tuple[dict[str, TaskMetrics], dict[str, float]]:
        """Metrics of what was counted since :meth:`totals` were taken, by task name.

        Args:
            totals: Of then.
            with_open: Whether the GAUC of windows that are not closed counts, too.

        Returns:
            The metrics, and the impressions behind each task's windowed GAUC, which are its weight in an average.
        """
        group_auc_T2 = (self._all_group_auc() if with_open else self._group_auc) - totals["group_auc"]
        metrics = {}
        for t, (task, tally) in enumerate(zip(self._schema.tasks, self._tallies, strict=True)):
            metrics[task.name] = _metrics(tally.since(under(f"{t}.", totals)))
        return self._with_group_auc(metrics, group_auc_T2), {
            task.name: weight for task, weight in zip(self._schema.tasks, group_auc_T2[:, 1].tolist(), strict=True)
        }

    def of_closed_windows(self) -> dict[str, TaskMetrics]:
        """Metrics so far by task name, with the GAUC of the closed windows: as cheap as :meth:`progressive`."""
        return self._with_group_auc(self.progressive(), self._group_auc)

    def report(self) -> dict[str, TaskMetrics]:
        """Metrics so far by task name, the open window included."""
        return self._with_group_auc(self.progressive(), self._all_group_auc())

    def _all_group_auc(self) -> F64:
        """Σ weight · AUC and Σ weight, windows that are not closed included. [T, 2]

        What waits is scored for it, and goes on waiting: where the next ones are scored must not depend on who asks.
        """
        self._being_scored.finish()
        group_auc_T2 = self._group_auc.copy()
        examples, whole_N = self._waiting.all()
        waiting = (examples.take(whole_N), self._scores_of_waiting()[whole_N])
        for window in (*self._unlabelled.values(), self._window.with_more(*waiting)):
            group_auc_T2 += window.group_auc()
        return group_auc_T2

    def _with_group_auc(self, metrics: dict[str, TaskMetrics], group_auc_T2: F64) -> dict[str, TaskMetrics]:
        for task, (weighted, weight) in zip(self._schema.tasks, group_auc_T2, strict=True):
            if task.kind == "binary" and weight:
                metrics[task.name] = replace(metrics[task.name], gauc_windowed=_defined(weighted / weight))
        return metrics

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` continues, with the windows that are not counted yet.

        What waits to be scored goes on waiting. It is there with its scores, too, for who has other weights
        (:func:`with_all_scored`).
        """
        self._being_scored.finish()
        state: Arrays = {"group_auc": self._group_auc, "window": np.array([self._period, self._before_window])}
        for t, tally in enumerate(self._tallies):
            state |= prefixed(f"{t}.", tally.state())
        windows = [*self._unlabelled.values(), self._window]
        state["windows"] = np.array([[w.number, w.counts, w.scored] for w in windows], np.int64)
        for window in windows:
            state |= prefixed(f"window.{window.number}.", window.arrays())
        state |= prefixed("open.", self._open.state())
        state |= self._waiting.state() | {SCORES: self._scores_of_waiting()}
        if self._frozen is not None:
            state |= prefixed("frozen.", self._frozen.state())
        return state

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`. Without frozen weights, the open window of a state that has one ends."""
        if self._freeze is None:
            state = {name: array for name, array in with_all_scored(state).items() if not name.startswith("frozen.")}
        for t, tally in enumerate(self._tallies):
            tally.load_state(under(f"{t}.", state))
        windows = {
            number: RankedWindow(
                self._schema.num_tasks,
                number,
                counts=bool(counts),
                scored=scored,
                arrays=under(f"window.{number}.", state),
            )
            for number, counts, scored in state["windows"].tolist()
        }
        self._window = windows.pop(max(windows))
        self._unlabelled = windows
        self._open.load_state(under("open.", state))
        self._waiting.load_state(state)
        self._group_auc = state["group_auc"].copy()
        self._period, self._before_window = (int(n) for n in state["window"])
        frozen = under("frozen.", state)
        self._frozen = self._thaw(frozen) if frozen and self._thaw is not None else None


def with_all_scored(state: Arrays) -> Arrays:
    """A state of :class:`ProgressiveEvaluation` whose open window ends: nothing waits in it to be scored."""
    scored = {name: array for name, array in state.items() if not name.startswith(WAITING)}
    examples, whole_N = WaitingExamples.of(state)
    if examples is None:
        return scored
    scores, number = state[SCORES], int(state["windows"][:, 0].max())
    window = RankedWindow(scores.shape[1], number, arrays=under(f"window.{number}.", state))
    window.add(examples.take(whole_N), scores[whole_N])
    opened = OpenImpressions(scores.shape[1])
    opened.load_state(under("open.", state))
    opened.score_frozen(examples.impression_id[~whole_N], scores[~whole_N])
    return scored | prefixed(f"window.{number}.", window.arrays()) | prefixed("open.", opened.state())


def _metrics(tally: BinaryTally | RegressionTally) -> TaskMetrics:
    """The metrics of a tally, without the GAUC."""
    if isinstance(tally, RegressionTally):
        return TaskMetrics(
            tally.examples,
            tally.positives,
            xauc=_defined(tally.xauc),
            mae=_defined(tally.mean_absolute_error),
            mean_bias=_defined(tally.mean_bias),
            not_scored=tally.not_scored,
        )
    report = tally.report()
    return TaskMetrics(
        report.examples,
        report.positives,
        base_rate=report.positives / report.examples if report.examples else None,
        auc=_defined(report.auc),
        ne=_defined(report.ne),
        ece=_defined(report.ece),
        calibration=_defined(report.calibration),
        not_scored=report.not_scored,
    )


def _beginning(examples: ExampleBlock) -> tuple[ExampleBlock, bool]:
    """The first example of each impression, and whether these have their final labels."""
    begins = examples.begins
    beginning = examples if begins.all() else examples.take(begins)
    return beginning, bool((examples.kind == WHOLE).all())


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
