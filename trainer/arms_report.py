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

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arm_names import MAIN, arm_column, distinct, named, names_of
from smes.arrays import F64, I64, Arrays, Bool, prefixed, under
from smes.events import WHOLE, ExampleBlock
from smes.hashing import splitmix64
from smes.schema import MISSING, Schema
from trainer.arm_figures import ArmFigure, ArmFigures, ArmTaskFigures
from trainer.observers import Observer, StepFigures

MAX_ARMS = 8
"""Most arms whose figures are kept, the main arm always. Impressions of further ones are only counted."""

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
        """Impressions of arms beyond those."""

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Count the impressions whose labels are final already."""
        self._count(examples, examples.kind == WHOLE)

    def after_failed_step(self, examples: ExampleBlock) -> None:
        """Count them, too: they were served, whatever became of the step."""
        self._count(examples, examples.kind == WHOLE)

    def after_closing(self, examples: ExampleBlock) -> None:
        """Count impressions whose final labels have come."""
        self._count(examples, np.ones(len(examples), np.bool_))

    def _count(self, examples: ExampleBlock, is_final: Bool) -> None:
        has_scores = ~np.isnan(examples.served_scores).all(axis=1)
        served = examples.served_arm.any(axis=1) | (examples.served_version != MISSING) | has_scores
        counted = served & is_final
        if not counted.any():
            return
        examples = examples if counted.all() else examples.take(counted)
        arms = examples.served_arm
        unnamed = ~arms.any(axis=1)
        for name in sorted({*distinct(arms), *((MAIN,) if unnamed.any() else ())}):
            rows = named(arms, name) | (unnamed if name == MAIN else False)
            others = len(self._arms.keys() - {MAIN})
            if name not in self._arms and name != MAIN and others == MAX_ARMS - 1:
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
    """Sums of one arm, by task and group of users."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._is_binary = np.array([task.kind == "binary" for task in schema.tasks])
        self._binary = np.cumsum(self._is_binary) - 1  # task → place among the binary ones
        self._impressions = np.zeros(1, np.int64)
        self._sums = np.zeros((schema.num_tasks, _GROUPS, 8), np.float64)
        # Negatives, positives by bin of the score's logit, of each binary task and group.
        self._counts = np.zeros((int(self._is_binary.sum()), _GROUPS, 2, _BINS), np.uint32)

    def add(self, examples: ExampleBlock) -> None:
        """Add examples; a score that is not finite is none."""
        self._impressions += len(examples)
        row, task = np.nonzero(examples.label_mask)
        group = _groups(examples.user_id)[row]
        label = examples.labels[row, task].astype(np.float64)
        score = examples.served_scores[row, task].astype(np.float64)
        cell = task * _GROUPS + group
        self._sum(cell, {_EXAMPLES: None, _POSITIVES: label > 0, _LABELS: label})
        scored = np.isfinite(score)
        task, group, cell, label, score = task[scored], group[scored], cell[scored], label[scored], score[scored]
        positive, loss = label > 0, np.abs(score - label)
        binary = self._is_binary[task]
        p = np.clip(score[binary], _EPSILON, 1 - _EPSILON)
        log_p, log_not_p = np.log(p), np.log1p(-p)
        loss[binary] = -np.where(positive[binary], log_p, log_not_p)
        bins = np.clip((log_p - log_not_p - _LOWEST) / _WIDTH, 0, _BINS - 1).astype(np.int64)
        at = ((self._binary[task[binary]] * _GROUPS + group[binary]) * 2 + positive[binary]) * _BINS + bins
        np.add.at(self._counts.reshape(-1), at, np.ones(len(at), np.uint32))  # another type is slow
        of_scored = {_SCORED: None, _SCORES: score, _SCORED_LABELS: label, _SCORED_POSITIVES: positive, _LOSS: loss}
        self._sum(cell, of_scored)

    def _sum(self, cell: I64, values: Mapping[int, NDArray[Any] | None]) -> None:
        """Add to columns of the sums, at ``cell`` = task · G + group: values, or one each."""
        for column, weights in values.items():
            added = np.bincount(cell, weights, self._schema.num_tasks * _GROUPS)
            self._sums[:, :, column] += added.reshape(-1, _GROUPS)

    def figures(self, main: "_ArmTally | None", weights_RG: F64) -> ArmFigures:
        """The figures; ``main`` is the main arm's tally, None for the main arm's own figures."""
        tasks = {
            task.name: self._of(t).figures(main._of(t) if main else None, weights_RG)
            for t, task in enumerate(self._schema.tasks)
        }
        return ArmFigures(int(self._impressions[0]), tasks)

    def _of(self, task: int) -> "_TaskTally":
        return _TaskTally(self._sums[task], self._counts[self._binary[task]] if self._is_binary[task] else None)

    def state(self) -> Arrays:
        """Copies of the sums."""
        arrays: Arrays = {"impressions": self._impressions, "sums": self._sums, "counts": self._counts}
        return {name: array.copy() for name, array in arrays.items()}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._impressions, self._sums, self._counts = (state[n].copy() for n in ("impressions", "sums", "counts"))


class _TaskTally:
    """The sums of one arm and task. ``counts`` uint32 [G, 2, bins], None for a regression task."""

    def __init__(self, sums: F64, counts: NDArray[np.uint32] | None) -> None:
        self._sums, self._counts = sums, counts

    def figures(self, main: "_TaskTally | None", weights_RG: F64) -> ArmTaskFigures:
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
            if self._counts is None:
                return {**estimates, "mae": mean_loss}
            rate = s[_SCORED_POSITIVES] / s[_SCORED]
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))  # NaN without one of the classes
            return {**estimates, "ne": mean_loss / entropy, "auc": _auc(weights @ self._counts.reshape(_GROUPS, -1))}


def _auc(counts: F64) -> F64:
    """Of each row of counts: negatives by bin, then positives. float64 [R, 2 · bins] → float64 [R]."""
    counts = counts.reshape(-1, 2, _BINS)
    negatives, positives = counts[:, 0], counts[:, 1]
    below = np.cumsum(negatives, axis=1) - negatives
    pairs: F64 = (positives * (below + negatives / 2)).sum(axis=1)
    auc: F64 = pairs / (positives.sum(axis=1) * negatives.sum(axis=1))
    return auc


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
