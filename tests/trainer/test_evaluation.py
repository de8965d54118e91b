"""Windowed GAUC, XAUC and served scores against naive loops with scikit-learn; a restart in mid-window changes nothing.

Guarantee shown: one frozen copy of the weights scores every example of a window. Groups are requests where the log has
them, else users. No group spans two windows, and the untrained first window does not count. A window never reaches over
the end of a window in which users' histories stay the same.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from smes.arm_names import arm_column
from smes.arrays import F32, I64, Arrays
from smes.events import CLOSING, FIRST, WHOLE, ExampleBlock
from smes.schema import MISSING, Feature, History, Schema, Task
from trainer.config import EvaluationConfig
from trainer.evaluation import FrozenModel, ProgressiveEvaluation, with_all_scored
from trainer.observers import StepFigures

SCHEMA = Schema("evaluated", tasks=(Task("click"), Task("like"), Task("watch", kind="regression")))
START_MS = 1_700_000_000_000
CLICK, LIKE, WATCH = range(3)


class Weights:
    """Weights that every step changes: the scores of a copy show when it was taken."""

    def __init__(self) -> None:
        self.version = 0

    def freeze(self) -> FrozenModel:
        return _Frozen(self.version)

    @staticmethod
    def thaw(state: Arrays) -> FrozenModel:
        return _Frozen(int(state["version"][0]))


class _Frozen:
    def __init__(self, version: int) -> None:
        self._version = version

    def state(self) -> Arrays:
        return {"version": np.array([self._version])}

    def close(self) -> None:
        pass

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        return scores_of(self._version, ids)


def scores_of(version: int, ids: I64) -> F32:
    """Any scores in 0 … 1 with ties, other ones for every version. float32 [N, 3]."""
    mixed = (ids[:, :1] * 7 + ids[:, 1:2] * (13 + 2 * version) + 5 * version * ids[:, :1] + np.arange(3)) % 11
    return (mixed / 11).astype(np.float32)


def batches(n: int, *, requests: float = 0.5, served: float = 0.0, seed: int = 0) -> list[ExampleBlock]:
    """``n`` examples, a second apart, in batches of 1 … 40; a share of them with request ids and served scores."""
    rng = np.random.default_rng(seed)
    block = ExampleBlock.empty(SCHEMA, n)
    block.event_time_ms[:] = START_MS + 1000 * np.arange(n)
    block.ids[:, 0] = rng.integers(0, 12, n)
    block.ids[:, 1] = rng.integers(0, 30, n)
    # A request has the number of a user too: they must not be taken for one group.
    block.request_id[:] = np.where(rng.random(n) < requests, rng.integers(0, 12, n), MISSING)
    block.labels[:, :2] = rng.random((n, 2)) < 0.3
    block.labels[:, 2] = np.where(rng.random(n) < 0.2, 0, rng.exponential(9, n))
    block.label_mask[:, LIKE] = rng.random(n) < 0.8
    block.label_mask[:, WATCH] = rng.random(n) < 0.7
    is_served = rng.random(n) < served
    block.served_scores[is_served] = rng.random((int(is_served.sum()), 3)).astype(np.float32)
    cuts = np.r_[0, np.cumsum(rng.integers(1, 40, n))]
    cuts = np.r_[cuts[cuts < n], n]
    return [block.take(slice(int(a), int(b))) for a, b in pairwise(cuts)]


def evaluation(config: EvaluationConfig, weights: Weights) -> ProgressiveEvaluation:
    return ProgressiveEvaluation(SCHEMA, config, freeze=weights.freeze, thaw=weights.thaw)


def run(evaluated: ProgressiveEvaluation, weights: Weights, stream: list[ExampleBlock]) -> None:
    for batch in stream:
        evaluated.before_step(batch)
        scores = scores_of(weights.version, batch.ids)
        weights.version += 1
        evaluated.after_step(batch, StepFigures(scores))


def windows(
    stream: list[ExampleBlock], window_s: float, window_examples: int
) -> Iterator[tuple[int, list[ExampleBlock]]]:
    """(version frozen, batches) of every window, worked out from the documentation of the configuration alone."""
    window: list[ExampleBlock] = []
    first = before = 0
    for version, batch in enumerate(stream):
        numbers = [int(ms / 1000 // window_s) for ms in batch.event_time_ms]
        for number in sorted(set(numbers)):
            part = batch.take(np.array(numbers) == number)
            most = min(window_examples, max(1024, before))  # early windows are no longer than all before them
            other = bool(window) and int(window[0].event_time_ms[0] / 1000 // window_s) != number
            if window and (other or sum(map(len, window)) >= most):
                yield first, window
                before += sum(map(len, window))
                window, first = [], version
            window.append(part)
    yield first, window


def naive_gauc(stream: list[ExampleBlock], window_s: float, window_examples: int, task: int) -> float:
    weighted = weight = 0.0
    for version, window in windows(stream, window_s, window_examples):
        if version == 0:
            continue  # scored by weights that have seen nothing
        groups: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        for batch in window:
            ours = scores_of(version, batch.ids)
            for row in range(len(batch)):
                if not batch.label_mask[row, task]:
                    continue
                request, user = int(batch.request_id[row]), int(batch.ids[row, 0])
                key = ("user", user) if request == MISSING else ("request", request)
                served = float(batch.served_scores[row, task])
                score = float(ours[row, task]) if np.isnan(served) else served
                groups[key].append((float(batch.labels[row, task]), score))
        for members in groups.values():
            labels, scores = zip(*members, strict=True)
            if 0 < sum(labels) < len(labels):
                weighted += len(members) * float(roc_auc_score(labels, scores))
                weight += len(members)
    return weighted / weight


@pytest.mark.parametrize(
    ("window_s", "window_examples"),
    [(1e9, 10**9), (100, 10**9), (1e9, 90), (150, 90)],
    ids=["growing", "by time", "by count", "by both"],
)
@pytest.mark.parametrize("served", [0.0, 0.4])
def test_windowed_gauc_is_the_naive_one(window_s: float, window_examples: int, served: float) -> None:
    bounded = window_s < 1e9 or window_examples < 10**9
    stream, weights = batches(700 if bounded else 5000, served=served), Weights()
    evaluated = evaluation(EvaluationConfig(window_s, window_examples), weights)
    run(evaluated, weights, stream)
    assert len(list(windows(stream, window_s, window_examples))) > 3
    report = evaluated.report()
    for task, name in ((CLICK, "click"), (LIKE, "like")):
        assert report[name].gauc_windowed == pytest.approx(
            naive_gauc(stream, window_s, window_examples, task), abs=1e-12
        )
    assert report["watch"].gauc_windowed is None


def test_auc_counts_the_served_score_where_there_is_one() -> None:
    stream, weights = batches(900, served=0.5), Weights()
    evaluated = evaluation(EvaluationConfig(), weights)
    run(evaluated, weights, stream)
    ours = np.concatenate([scores_of(version, batch.ids) for version, batch in enumerate(stream)])
    block = ExampleBlock.concat(stream)
    scores = np.where(np.isnan(block.served_scores), ours, block.served_scores)
    report = evaluated.report()
    for task, name in ((CLICK, "click"), (LIKE, "like")):
        rows = block.label_mask[:, task]
        labels = block.labels[rows, task]
        assert report[name].auc == pytest.approx(roc_auc_score(labels, scores[rows, task]), abs=2e-4)
        assert report[name].auc != pytest.approx(roc_auc_score(labels, ours[rows, task]), abs=1e-3)
        assert (report[name].examples, report[name].positives) == (rows.sum(), labels.sum())


def test_scores_that_another_arm_served_do_not_count() -> None:
    stream, weights = batches(900, served=0.8), Weights()
    for batch in stream:
        names = np.array(["", "b", "main"])[np.arange(len(batch)) % 3]
        batch.served_arm[:] = arm_column([name or None for name in names.tolist()])
    block = ExampleBlock.concat(stream)
    is_others = np.concatenate([np.arange(len(batch)) % 3 == 1 for batch in stream])
    evaluated = evaluation(EvaluationConfig(), weights)

    run(evaluated, weights, stream)

    ours = np.concatenate([scores_of(version, batch.ids) for version, batch in enumerate(stream)])
    scores = np.where(np.isnan(block.served_scores) | is_others[:, None], ours, block.served_scores)
    expected = roc_auc_score(block.labels[:, CLICK], scores[:, CLICK])
    assert evaluated.report()["click"].auc == pytest.approx(expected, abs=2e-4)


def test_xauc_is_the_share_of_pairs_in_order() -> None:
    stream, weights = batches(900), Weights()
    evaluated = evaluation(EvaluationConfig(), weights)
    run(evaluated, weights, stream)
    concordant = pairs = 0.0
    for version, batch in enumerate(stream):
        rows = batch.label_mask[:, WATCH]
        labels, scores = batch.labels[rows, WATCH], scores_of(version, batch.ids)[rows, WATCH]
        n = len(labels)
        for distance in {1, n // 2} if n > 1 else set():
            for i in range(n):
                label, score = labels[i] - labels[i - distance], scores[i] - scores[i - distance]
                if label != 0:
                    pairs += 1
                    concordant += 0.5 if score == 0 else float((label > 0) == (score > 0))
    block = ExampleBlock.concat(stream)
    rows = block.label_mask[:, WATCH]
    report = evaluated.report()["watch"]
    assert report.xauc == pytest.approx(concordant / pairs, abs=1e-12)
    assert (report.examples, report.positives) == (rows.sum(), (block.labels[rows, WATCH] > 0).sum())
    assert report.auc is None


class _BrokenFrozen(_Frozen):
    """Gives some items no score."""

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        return np.where(ids[:, 1:2] % 3 == 0, np.nan, super().score(ids, numerics)).astype(np.float32)


def test_metrics_of_scores_that_are_not_finite_are_none_and_counted() -> None:
    stream, weights = batches(3000), Weights()
    evaluated = ProgressiveEvaluation(
        SCHEMA,
        EvaluationConfig(),
        freeze=lambda: _BrokenFrozen(weights.version),
        thaw=weights.thaw,
    )
    missed = np.zeros(3, np.int64)
    for batch in stream:
        evaluated.before_step(batch)
        scores = _BrokenFrozen(weights.version).score(batch.ids, batch.numerics)
        weights.version += 1
        evaluated.after_step(batch, StepFigures(scores))
        missed += (np.isnan(scores) & batch.label_mask).sum(axis=0)

    report = evaluated.report()

    for t, name in enumerate(("click", "like", "watch")):
        figures = report[name]
        assert {figures.auc, figures.ne, figures.ece, figures.calibration, figures.gauc_windowed} == {None}
        assert {figures.xauc, figures.mae, figures.mean_bias} == {None}
        assert figures.not_scored == missed[t] > 0
        assert figures.examples > figures.not_scored


def test_mae_and_bias_are_of_the_scores_before_each_step() -> None:
    stream, weights = batches(900), Weights()
    evaluated = evaluation(EvaluationConfig(), weights)

    run(evaluated, weights, stream)

    rows = [batch.label_mask[:, WATCH] for batch in stream]
    scores = [scores_of(version, batch.ids)[:, WATCH] for version, batch in enumerate(stream)]
    errors = np.concatenate(
        [s[r] - batch.labels[r, WATCH] for s, r, batch in zip(scores, rows, stream, strict=True)], dtype=np.float64
    )
    report = evaluated.report()["watch"]
    assert report.mae == pytest.approx(np.abs(errors).mean(), rel=1e-6)
    assert report.mean_bias == pytest.approx(errors.mean(), rel=1e-6)


WITH_HISTORY = Schema(
    "with_history",
    SCHEMA.tasks,
    features=(
        Feature("seen", kind="sequence", max_length=2, vocabulary="item_id", query="item_id"),
        Feature("outcomes", kind="sequence", max_length=2, accompanies="seen"),
    ),
    history=History("seen", "outcomes", window_s=120),
)


@pytest.mark.parametrize("window_s", [None, 120, 40])
def test_windows_are_those_of_the_history_or_parts_of_them(window_s: float | None) -> None:
    stream, weights = batches(1200, requests=0.0), Weights()
    evaluated = ProgressiveEvaluation(
        WITH_HISTORY, EvaluationConfig(window_s=window_s), freeze=weights.freeze, thaw=weights.thaw
    )
    run(evaluated, weights, stream)
    expected = naive_gauc(stream, window_s or 120, 10**9, CLICK)
    assert evaluated.report()["click"].gauc_windowed == pytest.approx(expected, abs=1e-12)
    # Another origin, or another length, would give another figure: the check above can fail.
    assert expected != pytest.approx(naive_gauc(stream, 100, 10**9, CLICK), abs=1e-6)


@pytest.mark.parametrize("window_s", [240, 119.999, 86_400, 50])
def test_a_window_over_the_end_of_a_history_is_refused(window_s: float) -> None:
    with pytest.raises(ValueError, match=rf"window_s: {window_s}, expected a whole part.*history\.window_s 120"):
        ProgressiveEvaluation(
            WITH_HISTORY, EvaluationConfig(window_s=window_s), freeze=Weights().freeze, thaw=Weights.thaw
        )


@pytest.mark.parametrize("at", [1, 7, 18])
def test_a_restart_in_mid_window_changes_nothing(at: int) -> None:
    config = EvaluationConfig(window_s=150, window_examples=90)
    stream, weights = batches(700, served=0.2), Weights()
    whole = evaluation(config, weights)
    run(whole, weights, stream)
    assert whole.report()["click"].gauc_windowed is not None

    weights = Weights()
    first = evaluation(config, weights)
    run(first, weights, stream[:at])
    saved = {name: array.copy() for name, array in first.state().items()}
    run(first, Weights(), stream[at:])  # the old process must not change the saved state any more
    second = evaluation(config, weights)
    second.load_state(saved)
    run(second, weights, stream[at:])
    assert second.report() == whole.report()


class _ByTheCall(_Frozen):
    """Scores depend on how many rows are scored together, as the last bits of a real model's do."""

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        return (super().score(ids, numerics) + len(ids) * ids[:, 1:2] % 7 / 70).astype(np.float32)


class _WeightsByTheCall(Weights):
    def freeze(self) -> FrozenModel:
        return _ByTheCall(self.version)

    @staticmethod
    def thaw(state: Arrays) -> FrozenModel:
        return _ByTheCall(int(state["version"][0]))


def by_the_call(weights: Weights) -> ProgressiveEvaluation:
    config = EvaluationConfig(window_s=150, window_examples=90)
    return ProgressiveEvaluation(SCHEMA, config, freeze=weights.freeze, thaw=weights.thaw, scored_together=50)


def test_what_is_scored_together_depends_on_the_examples_alone() -> None:
    stream, weights = batches(700), _WeightsByTheCall()
    run(whole := by_the_call(weights), weights, stream)

    weights = _WeightsByTheCall()
    evaluated = by_the_call(weights)
    for batch in stream:
        run(evaluated, weights, [batch])
        evaluated.report()
        state = {name: array.copy() for name, array in evaluated.state().items()}
        evaluated = by_the_call(weights)
        evaluated.load_state(state)

    assert evaluated.report() == whole.report()
    run(at_once := evaluation(EvaluationConfig(150, 90), weights := _WeightsByTheCall()), weights, stream)
    assert at_once.report() != whole.report(), "the scores tell how many were scored together"


@pytest.mark.parametrize("kind", [WHOLE, FIRST])
def test_a_window_that_ends_by_force_counts_what_waited_in_it(kind: int) -> None:
    stream, weights = batches(300), Weights()
    for batch in stream:
        batch.impression_id[:] = batch.event_time_ms
        batch.kind[:] = kind
    went_on = ProgressiveEvaluation(
        SCHEMA, EvaluationConfig(), freeze=weights.freeze, thaw=weights.thaw, first_window_counts=True
    )
    run(went_on, weights, stream)
    state = with_all_scored({name: array.copy() for name, array in went_on.state().items()})
    assert not [name for name in state if name.startswith("waiting.")]
    other = evaluation(EvaluationConfig(), weights)

    other.load_state({name: array for name, array in state.items() if not name.startswith("frozen.")})

    if kind == FIRST:
        closings = ExampleBlock.concat(stream)
        closings.kind[:] = CLOSING
        for evaluated in (went_on, other):
            evaluated.after_closing(closings)
    assert other.report() == went_on.report()
    assert other.report()["click"].gauc_windowed is not None


def test_the_untrained_window_alone_gives_no_gauc() -> None:
    weights = Weights()
    evaluated = evaluation(EvaluationConfig(), weights)
    run(evaluated, weights, batches(300))
    assert evaluated.report()["click"].gauc_windowed is None
    assert evaluated.report()["click"].auc is not None


def test_nothing_seen_is_none_everywhere() -> None:
    report = evaluation(EvaluationConfig(), Weights()).report()
    for name in ("click", "like"):
        metrics = report[name]
        undefined = (metrics.auc, metrics.gauc_windowed, metrics.ne, metrics.ece, metrics.calibration)
        assert (metrics.examples, metrics.positives, undefined) == (0, 0, (None,) * 5)
    watch = report["watch"]
    assert (watch.xauc, watch.mae, watch.mean_bias) == (None, None, None)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"window_s": 0.0}, "EvaluationConfig.window_s: 0.0, expected at least 0.001"),
        ({"window_s": float("nan")}, "EvaluationConfig.window_s: nan, expected at least 0.001"),
        ({"window_examples": 0}, "EvaluationConfig.window_examples: 0, expected at least 1"),
    ],
)
def test_bounds_out_of_range_are_refused(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EvaluationConfig(**bounds)
