"""Metrics against scikit-learn and naive loops."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss, mean_absolute_error, roc_auc_score

from smes.metrics import BinaryTally, RegressionTally, group_auc


def draw(n: int, rate: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    logit = rng.normal(np.log(rate / (1 - rate)), 1.5, n)
    probability = 1 / (1 + np.exp(-logit))
    label = rng.random(n) < probability
    return probability.astype(np.float32), label.astype(np.float32)


def draw_durations(n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(predictions, labels), the predictions too large on average."""
    rng = np.random.default_rng(2)
    label = rng.exponential(10, n).astype(np.float32)
    return (label + rng.normal(3, 8, n)).astype(np.float32), label


@pytest.mark.parametrize("rate", [0.4, 0.01])
def test_binary_tally_equals_scikit_learn(rate: float) -> None:
    probability, label = draw(50_000, rate)
    tally = BinaryTally()
    for part in np.array_split(np.arange(len(label)), 13):
        tally.add(probability[part], label[part])
    report = tally.report()
    base = label.mean()
    assert report.examples == 50_000
    assert report.positives == int(label.sum())
    assert report.auc == pytest.approx(roc_auc_score(label, probability), abs=1e-5)
    assert report.ne == pytest.approx(
        log_loss(label, probability) / log_loss(label, np.full(len(label), base)), rel=1e-5
    )
    assert report.calibration == pytest.approx(probability.mean() / base, rel=1e-5)


def test_ece_equals_sorted_equal_mass_bins() -> None:
    probability, label = draw(40_000, 0.2)
    tally = BinaryTally()
    tally.add(np.minimum(probability * 1.3, 1).astype(np.float32), label)  # over-confident on purpose
    order = np.argsort(probability)
    naive = sum(
        abs(float(np.minimum(probability[part] * 1.3, 1).sum() - label[part].sum()))
        for part in np.array_split(order, 20)
    )
    assert tally.report().ece == pytest.approx(naive / len(label), abs=2e-3)
    assert tally.report().ece > 0.03


def test_metrics_of_no_examples_are_nan() -> None:
    binary, regression = BinaryTally().report(), RegressionTally()

    undefined = (binary.auc, binary.ne, binary.ece, binary.calibration)
    assert np.isnan([*undefined, regression.xauc, regression.mean_absolute_error, regression.mean_bias]).all()


def test_metrics_that_need_both_classes_are_nan_where_one_is_missing() -> None:
    tally = BinaryTally()

    tally.add(np.array([0.2, 1.0, 0.0], np.float32), np.zeros(3, np.float32))

    report = tally.report()
    assert (report.examples, report.positives) == (3, 0)
    assert np.isnan([report.auc, report.ne]).all()
    assert report.ece == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["one", "every positive", "every negative", "all"])
def test_metrics_of_scores_that_are_not_finite_are_undefined(where: str, value: float) -> None:
    probability, label = draw(400, 0.3)
    rows = {"one": np.arange(400) == 7, "every positive": label > 0, "every negative": label == 0, "all": label >= 0}
    probability[rows[where]] = value
    binary, regression = BinaryTally(), RegressionTally()

    for part in np.array_split(np.arange(400), 7):
        binary.add(probability[part], label[part])
        regression.add(probability[part], label[part])

    report = binary.report()
    figures = (report.auc, report.ne, report.ece, report.calibration)
    assert np.isnan([*figures, regression.xauc, regression.mean_absolute_error, regression.mean_bias]).all()
    for counts in (report, regression):
        assert (counts.examples, counts.positives, counts.not_scored) == (400, label.sum(), rows[where].sum())
    restored = BinaryTally()
    restored.load_state(binary.state())
    assert np.isnan(restored.report().auc)
    assert restored.report().not_scored == rows[where].sum()


@pytest.mark.parametrize("positive", [True, False])
def test_a_groups_auc_is_undefined_where_a_score_is_not_finite(positive: bool) -> None:
    group, label = np.array([1, 1, 1, 2, 2, 3]), np.array([1, 0, 0, 1, 0, 1], np.float32)
    score = np.array([0.3, 0.2, 0.1, 0.9, 0.1, 0.5], np.float32)
    score[0 if positive else 1] = np.nan

    auc, examples, ids = group_auc(group, score, label)

    assert np.isnan(auc).tolist() == [True, False]
    assert auc[1] == 1.0
    assert (examples.tolist(), ids.tolist()) == ([3, 2], [1, 2])


def test_a_binary_tally_continues_from_its_state() -> None:
    probability, label = draw(2000, 0.3)
    whole, first, second = BinaryTally(), BinaryTally(), BinaryTally()
    whole.add(probability, label)
    first.add(probability[:700], label[:700])

    second.load_state(first.state())
    second.add(probability[700:], label[700:])

    assert second.report().auc == whole.report().auc
    assert second.report().ne == pytest.approx(whole.report().ne)


def test_a_regression_tally_continues_from_its_state() -> None:
    value, label = draw_durations(2000)
    whole, first, second = RegressionTally(), RegressionTally(), RegressionTally()
    whole.add(value[:700], label[:700])
    whole.add(value[700:], label[700:])
    first.add(value[:700], label[:700])

    second.load_state(first.state())
    second.add(value[700:], label[700:])

    for name in ("examples", "positives", "xauc", "mean_absolute_error", "mean_bias"):
        assert getattr(second, name) == getattr(whole, name), name


def test_a_state_is_a_copy() -> None:
    value, label = draw_durations(10)
    tally = RegressionTally()
    tally.add(value, label)
    state = tally.state()

    tally.add(value, label)

    assert state["sums"][0] == 10


@pytest.mark.parametrize("lowest", [0, -5, 10**12, 2**31 - 300])
def test_group_auc_equals_scikit_learn_per_group(lowest: int) -> None:
    rng = np.random.default_rng(1)
    group = lowest + rng.integers(0, 300, 3000)
    score = rng.integers(-6, 6, 3000).astype(np.float32) * np.float32(0.1)  # many ties
    score[score == 0] = rng.choice(np.array([0.0, -0.0], np.float32), int((score == 0).sum()))
    label = (rng.random(3000) < 0.3).astype(np.float32)
    auc, examples, ids = group_auc(group, score, label)
    expected = {}
    for g in np.unique(group):
        rows = group == g
        if len(set(label[rows])) == 2:
            expected[int(g)] = (roc_auc_score(label[rows], score[rows]), int(rows.sum()))
    assert ids.tolist() == sorted(expected)
    for g, a, n in zip(ids.tolist(), auc, examples, strict=True):
        assert (pytest.approx(a), n) == expected[g]
    assert group_auc(group[:0], score[:0], label[:0])[0].size == 0


def test_xauc_estimates_the_share_of_concordant_pairs() -> None:
    value, label = draw_durations(4000)
    i, j = np.random.default_rng(3).integers(0, 4000, (2, 400_000))
    i, j = i[i != j], j[i != j]
    expected = ((label[i] < label[j]) == (value[i] < value[j])).mean()
    tally = RegressionTally()

    for part in np.array_split(np.arange(4000), 8):
        tally.add(value[part], label[part])

    assert tally.xauc == pytest.approx(expected, abs=0.02)


def test_errors_of_a_regression_equal_scikit_learn() -> None:
    value, label = draw_durations(4000)
    tally = RegressionTally()

    for part in np.array_split(np.arange(4000), 8):
        tally.add(value[part], label[part])

    assert tally.mean_absolute_error == pytest.approx(mean_absolute_error(label, value), rel=1e-5)
    assert tally.mean_bias == pytest.approx(value.astype(float).mean() - label.astype(float).mean(), rel=1e-5)
    assert tally.mean_bias > 2
    assert (tally.examples, tally.positives) == (4000, 4000)


def test_the_histograms_are_bit_for_bit_those_of_bincount() -> None:
    rng = np.random.default_rng(5)
    tally, counts, predicted = BinaryTally(), np.zeros((2, 8192), np.int64), np.zeros(8192)
    for n in (1, 0, 300, 4000):
        scores = (rng.integers(0, 50, n) / 50).astype(np.float32)  # many in one bin
        labels = (rng.random(n) < 0.3).astype(np.float32)
        tally.add(scores, labels)
        p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
        bins = np.clip(((np.log(p) - np.log1p(-p) + 16) * 256).astype(np.int64), 0, 8191)
        counts += [np.bincount(bins[labels == value], minlength=8192) for value in (0, 1)]
        predicted += np.bincount(bins, weights=p, minlength=8192)
    state = tally.state()
    np.testing.assert_array_equal(state["counts"], counts)
    np.testing.assert_array_equal(state["predicted"], predicted)
