"""The gate's tests, against other libraries and against what they promise: how often noise passes for a difference."""

from math import comb
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

from smes.arrays import F32
from trainer.gate_statistics import (
    compare_auc,
    compare_losses,
    largest_shares,
    losses,
    odds_ratio,
    signed_deviance,
    slope,
    terms,
)

RNG = np.random.default_rng(5)
BINARY = np.array([True])


def scores(n: int, rate: float, spread: float = 1.0) -> F32:
    """Probabilities around a base rate."""
    p: F32 = (1 / (1 + np.exp(-RNG.normal(np.log(rate / (1 - rate)), spread, n)))).astype(np.float32)
    return p


def drawn(p: F32) -> F32:
    """Labels of which these are the true probabilities."""
    labels: F32 = (RNG.random(len(p)) < p).astype(np.float32)
    return labels


def slope_z(p: F32, labels: F32) -> float:
    sums = terms(p[:, None], labels[:, None], np.ones((len(p), 1), np.bool_), BINARY).sum(axis=0)
    score, _, variance = slope(sums)
    return float(score[0] / np.sqrt(variance[0]))


@pytest.mark.parametrize(("n", "rate"), [(200, 0.05), (900, 0.01), (500, 0.4)])
def test_the_deviance_has_the_tail_of_the_binomial(n: int, rate: float) -> None:
    counts = np.arange(1, n)
    z = signed_deviance(counts.astype(float), np.full(len(counts), n * rate), np.full(len(counts), float(n)))
    far = counts[(z > 3) & (z < 6)]
    exact = np.array([sum(comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(f, n + 1)) for f in far.tolist()])
    by_z = np.array([NormalDist().cdf(-value) for value in z[(z > 3) & (z < 6)].tolist()])
    assert len(far) > 3
    assert (exact < 3 * by_z).all(), "noise does not pass for a difference more often than the normal tail says"
    assert (exact > by_z / 3).all()


def test_the_odds_ratio_of_equal_counts_is_one() -> None:
    count, of = np.array([7.0]), np.array([90.0])
    assert odds_ratio(count, count, of)[0] == pytest.approx(1)
    assert odds_ratio(np.array([45.0]), np.array([9.0]), of)[0] == pytest.approx(9, rel=0.1)


@pytest.mark.parametrize("rate", [0.03, 0.3])
def test_the_slope_of_calibrated_scores_varies_as_it_says(rate: float) -> None:
    z = np.array([slope_z(p, drawn(p)) for p in (scores(2048, rate) for _ in range(400))])
    assert z.mean() == pytest.approx(0, abs=0.2)
    assert z.std() == pytest.approx(1, abs=0.15)


def test_flipped_labels_lower_the_slope_at_any_base_rate() -> None:
    for rate in (0.1, 0.5):
        p = scores(512, rate)
        assert slope_z(p, 1 - drawn(p)) < -8


def test_losses_are_log_loss_and_absolute_error() -> None:
    p = scores(300, 0.2)
    labels = drawn(p)
    assert losses(p, labels, binary=True).mean() == pytest.approx(log_loss(labels, p), rel=1e-5)
    assert losses(p, labels, binary=False).mean() == pytest.approx(np.abs(p - labels).mean(), rel=1e-5)


def test_aucs_are_those_of_another_library_and_their_error_that_of_a_bootstrap() -> None:
    truth = scores(1500, 0.15)
    labels, served = drawn(truth), truth
    candidate: F32 = np.clip(truth * np.exp(RNG.normal(0, 0.7, len(truth))), 0, 1).round(2).astype(np.float32)  # ties
    found = compare_auc(candidate, served, labels)
    assert found.candidate == pytest.approx(roc_auc_score(labels, candidate))
    assert found.served == pytest.approx(roc_auc_score(labels, served))
    differences = []
    for _ in range(400):
        rows: NDArray[np.int64] = RNG.integers(0, len(labels), len(labels))
        differences.append(roc_auc_score(labels[rows], served[rows]) - roc_auc_score(labels[rows], candidate[rows]))
    assert found.z == pytest.approx((found.served - found.candidate) / np.std(differences), rel=0.15)


@pytest.mark.parametrize("rate", [0.005, 0.05, 0.4])
def test_noise_alone_rarely_passes_for_a_worse_loss(rate: float) -> None:
    """A candidate as good as the version in service, 1,500 times: z beyond 3 has probability 0.00135 a time."""
    worse = 0
    for _ in range(1500):
        truth = scores(600, rate)
        one, other = (np.clip(truth * np.exp(RNG.normal(0, 0.1, 600)), 1e-6, 0.999).astype(np.float32) for _ in "ab")
        worse += compare_losses(one, other, drawn(truth), binary=True).z > 3
    assert worse <= 8


def test_a_stretch_without_positives_says_nothing_of_a_rare_task() -> None:
    """The differences hardly vary there, and a plain paired test is sure of itself."""
    served = np.full(1300, 0.0071, np.float32)
    candidate, labels = served * np.float32(1.03), np.zeros(1300, np.float32)
    assert compare_losses(candidate, served, labels, binary=True).z < 1


def test_a_worse_candidate_is_found() -> None:
    truth = scores(2000, 0.2)
    labels = drawn(truth)
    blurred: F32 = (1 / (1 + np.exp(-(np.log(truth / (1 - truth)) + RNG.normal(0, 1.0, 2000))))).astype(np.float32)
    assert compare_losses(blurred, truth, labels, binary=True).z > 5
    assert compare_auc(blurred, truth, labels).z > 5
    assert compare_losses(truth, blurred, labels, binary=True).z < -5


def test_the_largest_share_is_a_count_by_hand() -> None:
    users = np.array([1, 2, 2, 3, 2, 1, 1, 1])
    positive = np.array([1, 1, 1, 0, 1, 0, 0, 0], np.bool_)[:, None]
    most, total = largest_shares(users, positive, [4, 8])
    assert most.tolist() == [[3, 1], [4, 3]]
    assert total.tolist() == [[4, 1], [8, 4]]
