"""How well each of the scorer's arms served: its scores, as the log carries them, joined with the final labels.

Every impression counts once, with its final labels, whatever the trainer's own weights say of it, and whether or not
its step succeeded. What carries neither version nor arm nor scores was not served, and does not count.

Intervals are of a bootstrap over users. Users are spread over 64 groups by a hash; sums are kept for each group, and
the groups are drawn again with replacement. So examples of one user stay together, memory is bounded whatever the
number of users, and one pass over the stream is enough. With 64 groups a standard error is known to about 9 %. The same
draws serve all arms, so the interval of a difference holds whether arms share users or not.

Source of the bootstrap in one pass: Chamandy et al., "Estimating Uncertainty for Massive Data Streams" (Google, 2012);
we draw groups of users where they draw a weight for each. Letters: N examples, T tasks, G groups, R draws.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arm_names import MAIN, arm_column, distinct, named, names_of
from smes.arrays import F32, F64, I64, Arrays, Bool, prefixed, under
from smes.events import WHOLE, ExampleBlock
from smes.hashing import splitmix64
from smes.schema import MISSING, Schema, Task
from trainer.arm_figures import ArmFigure, ArmFigures, ArmTaskFigures
from trainer.observers import Observer, StepFigures

MAX_ARMS = 8
"""Most arms whose figures are kept. Impressions of further ones are only counted."""

_GROUPS = 64
_FEWEST_GROUPS = 20
_DRAWS = 500
_T_95 = 1.998  # of Student's t with 63 degrees of freedom
_SALT = np.int64(0x5EED_A12B)  # users must not be grouped as they are split
_BINS, _LOWEST, _WIDTH = 512, -10.0, 1 / 32
_EPSILON = 1e-7

_EXAMPLES, _POSITIVES, _LABELS, _SCORED, _SCORES, _SCORED_LABELS, _SCORED_POSITIVES, _LOSS = range(8)
"""Sums of a group: labelled examples, with a positive label, of their labels; those with a served score, of these
scores, of their labels, with a positive label, and of their log loss (binary) or absolute error (regression).
"""


class ArmTallies(Observer):
    """Sums of every arm, in bounded memory: about 270 kB for an arm and a binary task.

    Args:
        schema: Tasks.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._arms: dict[str, _ArmTally] = {}
        self.left_out = 0
        """Impressions of arms beyond the first :data:`MAX_ARMS`."""

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Count the impressions whose labels are final already."""
        self._count(examples.take(examples.kind == WHOLE))

    def after_failed_step(self, examples: ExampleBlock) -> None:
        """Count them, too: they were served, whatever became of the step."""
        self._count(examples.take(examples.kind == WHOLE))

    def after_closing(self, examples: ExampleBlock) -> None:
        """Count impressions whose final labels have come."""
        self._count(examples)

    def _count(self, examples: ExampleBlock) -> None:
        arms = examples.served_arm
        has_scores = ~np.isnan(examples.served_scores).all(axis=1)
        served = arms.any(axis=1) | (examples.served_version != MISSING) | has_scores
        if not served.any():
            return
        examples = examples if served.all() else examples.take(served)
        arms = examples.served_arm
        unnamed = ~arms.any(axis=1)
        for name in sorted({*distinct(arms), *((MAIN,) if unnamed.any() else ())}):
            rows = named(arms, name) | (unnamed if name == MAIN else False)
            if name not in self._arms and len(self._arms) == MAX_ARMS:
                self.left_out += int(np.count_nonzero(rows))
                continue
            self._arms.setdefault(name, _ArmTally(self._schema)).add(examples.take(rows))

    def report(self) -> dict[str, ArmFigures]:
        """Arm → figures, the main arm first, the others by name."""
        main = self._arms.get(MAIN)
        weights_RG = _draws()
        names = sorted(self._arms, key=lambda name: (name != MAIN, name))
        return {name: self._arms[name].figures(None if name == MAIN else main, weights_RG) for name in names}

    def state(self) -> Arrays:
        """Copies of the arrays from which :meth:`load_state` goes on; none before an arm served."""
        if not self._arms:
            return {}
        state: Arrays = {"names": arm_column(list(self._arms)), "left_out": np.array([self.left_out])}
        for i, tally in enumerate(self._arms.values()):
            state |= prefixed(f"{i}.", tally.state())
        return state

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        names = names_of(state["names"]) if state else []
        self._arms = {}
        for i, name in enumerate(names):
            assert name is not None
            self._arms[name] = _ArmTally(self._schema)
            self._arms[name].load_state(under(f"{i}.", state))
        self.left_out = int(state["left_out"][0]) if state else 0


class _ArmTally:
    """Sums of one arm."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._impressions = np.zeros(1, np.int64)
        self._tasks = [_TaskTally(task) for task in schema.tasks]

    def add(self, examples: ExampleBlock) -> None:
        self._impressions += len(examples)
        group_N = _groups(examples.user_id)
        for t, tally in enumerate(self._tasks):
            rows = examples.label_mask[:, t]
            tally.add(group_N[rows], examples.served_scores[rows, t], examples.labels[rows, t])

    def figures(self, main: "_ArmTally | None", weights_RG: F64) -> ArmFigures:
        tasks = {
            task.name: tally.figures(main._tasks[t] if main else None, weights_RG)
            for t, (task, tally) in enumerate(zip(self._schema.tasks, self._tasks, strict=True))
        }
        return ArmFigures(int(self._impressions[0]), tasks)

    def state(self) -> Arrays:
        state: Arrays = {"impressions": self._impressions.copy()}
        for t, tally in enumerate(self._tasks):
            state |= prefixed(f"{t}.", tally.state())
        return state

    def load_state(self, state: Arrays) -> None:
        self._impressions = state["impressions"].copy()
        for t, tally in enumerate(self._tasks):
            tally.load_state(under(f"{t}.", state))


class _TaskTally:
    """Sums of one arm and task, by group of users."""

    def __init__(self, task: Task) -> None:
        self._is_binary = task.kind == "binary"
        self._sums = np.zeros((_GROUPS, 8), np.float64)
        bins = _BINS if self._is_binary else 0
        self._counts = np.zeros((_GROUPS, 2, bins), np.uint32)  # negatives, positives by bin of the score's logit

    def add(self, group_N: I64, score_N: F32, label_N: F32) -> None:
        """Add labelled examples; a score that is not finite is none."""
        scored: Bool = np.isfinite(score_N)
        self._sum(_EXAMPLES, group_N, np.ones(len(group_N)))
        self._sum(_POSITIVES, group_N, label_N > 0)
        self._sum(_LABELS, group_N, label_N)
        group_N, score, label = group_N[scored], score_N[scored].astype(np.float64), label_N[scored].astype(np.float64)
        positive = label > 0
        loss = np.abs(score - label)
        if self._is_binary:
            p = np.clip(score, _EPSILON, 1 - _EPSILON)
            loss = -np.where(positive, np.log(p), np.log1p(-p))
            logit = np.log(p) - np.log1p(-p)
            bin_N = np.clip((logit - _LOWEST) / _WIDTH, 0, _BINS - 1).astype(np.int64)
            np.add.at(self._counts, (group_N, positive.astype(np.int64), bin_N), 1)
        self._sum(_SCORED, group_N, np.ones(len(group_N)))
        self._sum(_SCORES, group_N, score)
        self._sum(_SCORED_LABELS, group_N, label)
        self._sum(_SCORED_POSITIVES, group_N, positive)
        self._sum(_LOSS, group_N, loss)

    def _sum(self, column: int, group_N: I64, values_N: NDArray[Any]) -> None:
        self._sums[:, column] += np.bincount(group_N, weights=values_N, minlength=_GROUPS)

    def figures(self, main: "_TaskTally | None", weights_RG: F64) -> ArmTaskFigures:
        """The figures; ``main`` is the main arm's tally, None for the main arm's own figures."""
        ours, theirs = self._estimates(weights_RG), main._estimates(weights_RG) if main else None
        enough = self._groups_with_examples >= _FEWEST_GROUPS
        both = enough and main is not None and main._groups_with_examples >= _FEWEST_GROUPS
        figures = {
            name: _figure(values, theirs[name] if theirs else None, own=enough, both=both)
            for name, values in ours.items()
        }
        total = self._sums.sum(axis=0)
        return ArmTaskFigures(
            examples=int(total[_EXAMPLES]),
            scored=int(total[_SCORED]),
            positives=int(total[_POSITIVES]),
            mean_label=figures["mean_label"],
            auc=figures.get("auc"),
            ne=figures.get("ne"),
            calibration=figures["calibration"],
            mae=figures.get("mae"),
        )

    @property
    def _groups_with_examples(self) -> int:
        return int(np.count_nonzero(self._sums[:, _EXAMPLES]))

    def _estimates(self, weights_RG: F64) -> dict[str, F64]:
        """Each figure over all groups, and then of each draw. float64 [1 + R], NaN where undefined."""
        weights = np.concatenate([np.ones((1, _GROUPS)), weights_RG])
        s = (weights @ self._sums).T
        with np.errstate(divide="ignore", invalid="ignore"):
            estimates: dict[str, F64] = {
                "mean_label": s[_LABELS] / s[_EXAMPLES],
                "calibration": np.where(s[_SCORED_LABELS] > 0, s[_SCORES] / s[_SCORED_LABELS], np.nan),
            }
            mean_loss = s[_LOSS] / s[_SCORED]
            if not self._is_binary:
                return {**estimates, "mae": mean_loss}
            rate = s[_SCORED_POSITIVES] / s[_SCORED]
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))  # NaN without one of the classes
            return {**estimates, "ne": mean_loss / entropy, "auc": self._auc(weights)}

    def _auc(self, weights: F64) -> F64:
        counts = (weights @ self._counts.reshape(_GROUPS, -1)).reshape(len(weights), 2, _BINS)
        negatives, positives = counts[:, 0], counts[:, 1]
        below = np.cumsum(negatives, axis=1) - negatives
        pairs: F64 = (positives * (below + negatives / 2)).sum(axis=1)
        auc: F64 = pairs / (positives.sum(axis=1) * negatives.sum(axis=1))
        return auc

    def state(self) -> Arrays:
        return {"sums": self._sums.copy(), "counts": self._counts.copy()}

    def load_state(self, state: Arrays) -> None:
        self._sums, self._counts = state["sums"].copy(), state["counts"].copy()


def _groups(user_id: I64) -> I64:
    """The group of each user. int64 [N] → int64 [N]."""
    groups: I64 = (splitmix64(user_id ^ _SALT) % np.uint64(_GROUPS)).astype(np.int64)
    return groups


def _draws() -> F64:
    """How often each draw has each group: the same draws every time. float64 [R, G]."""
    rng = np.random.default_rng(0)
    return rng.multinomial(_GROUPS, np.full(_GROUPS, 1 / _GROUPS), _DRAWS).astype(np.float64)


def _figure(ours: F64, theirs: F64 | None, *, own: bool, both: bool) -> ArmFigure:
    """A figure and its difference to the main arm's, with intervals where there are groups enough."""
    own_bounds = _interval(ours, enough=own)
    if theirs is None:
        return ArmFigure(*own_bounds)
    return ArmFigure(*own_bounds, *_interval(ours - theirs, enough=both))


def _interval(values: F64, *, enough: bool) -> tuple[float | None, float | None, float | None]:
    """The first of the values, and it less and plus the interval's half by the deviation of the others."""
    value, draws = float(values[0]), values[1:]
    if not np.isfinite(value):
        return None, None, None
    if not enough or not np.isfinite(draws).all():
        return value, None, None
    half = _T_95 * float(draws.std(ddof=1))
    return value, value - half, value + half
