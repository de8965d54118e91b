import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.auc_bootstrap import TaskExamples, draw_positives, draw_users, resampled_auc_and_ne
from benchmarks.bootstrap import F64
from smes.arrays import F32

USERS = 40


def examples(seed: int, num: int = 600, rate: float = 0.1, task: int = 0) -> TaskExamples:
    rng = np.random.default_rng(seed)
    return TaskExamples(rng.integers(USERS, size=num), rng.random(num) < rate, USERS, task)


def noise(seed: int, num: int = 600, digits: int = 7) -> F32:
    return (0.06 + 0.88 * np.random.default_rng(seed).random(num)).round(digits).astype(np.float32)


def figures(x: TaskExamples, models: list[F32], resamples: int, seed: int = 0) -> tuple[F64, F64]:
    auc_RM, ne_RM = resampled_auc_and_ne(x, models.__getitem__, len(models), resamples, seed)
    return auc_RM, ne_RM


def weights(x: TaskExamples, resample: int, seed: int) -> F64:
    """How often each example counts in one resample: negatives by the user's draws, positives by their own."""
    first, column = resample - resample % 64, resample % 64
    drawn_UL = draw_users(USERS, first, seed)
    place_P = np.flatnonzero(x.positive_N)
    place_P = place_P[np.argsort(x.user_N[place_P], kind="stable")]
    weight_N: F64 = drawn_UL[x.user_N, column].astype(np.float64)
    weight_N[place_P] = draw_positives(x.user_N[place_P], drawn_UL, first, seed, x.task)[:, column]
    return weight_N


@pytest.mark.parametrize("digits", [7, 1])  # 1: most scores are tied
def test_the_data_themselves_and_every_resample_are_those_of_a_weighted_auc(digits: int) -> None:
    x, models = examples(0), [noise(1, digits=digits), noise(2, digits=digits)]
    auc_RM, ne_RM = figures(x, models, resamples=100, seed=5)
    assert auc_RM.shape == ne_RM.shape == (101, 2)
    for m, score_N in enumerate(models):
        assert auc_RM[0, m] == pytest.approx(roc_auc_score(x.positive_N, score_N), rel=1e-12)
        for r in (0, 1, 63, 64, 100):
            weight_N = weights(x, r, seed=5) if r else np.ones(len(score_N))
            expected = roc_auc_score(x.positive_N, score_N, sample_weight=weight_N)
            assert auc_RM[r, m] == pytest.approx(expected, rel=1e-12)
            rate = np.average(x.positive_N, weights=weight_N)
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
            loss = log_loss(x.positive_N, score_N.astype(np.float64), sample_weight=weight_N)
            assert ne_RM[r, m] == pytest.approx(loss / entropy, rel=1e-9)


def test_a_drawn_user_gives_all_negatives_and_as_many_draws_of_positives_as_there_are() -> None:
    x = examples(1, rate=0.3)
    for resample in (1, 70):
        weight_N = weights(x, resample, seed=3)
        for user in range(USERS):
            own = x.user_N == user
            (times,) = np.unique(weight_N[own & ~x.positive_N])
            assert weight_N[own & x.positive_N].sum() == times * (own & x.positive_N).sum()
        uneven = [len(np.unique(weight_N[(x.user_N == user) & x.positive_N])) > 1 for user in range(USERS)]
        assert sum(uneven) > USERS / 3, "positives of one user are not drawn one by one"


def test_each_positive_of_a_user_is_drawn_equally_often() -> None:
    user_P = np.repeat([0, 1, 2], [1, 4, 2])
    drawn = [draw_positives(user_P, draw_users(3, first, 0), first, 0, task=0)[:, 1:] for first in range(0, 6400, 64)]
    mean_P = np.concatenate(drawn, axis=1).mean(axis=1)
    np.testing.assert_allclose(mean_P, 1, atol=0.08)  # a standard error is at most 0.018


def test_all_models_get_the_same_draws_and_all_tasks_the_same_users() -> None:
    x, score_N = examples(2), noise(3)
    auc_RM, ne_RM = figures(x, [score_N, score_N], resamples=30)
    np.testing.assert_array_equal(auc_RM[:, 0], auc_RM[:, 1])
    np.testing.assert_array_equal(ne_RM[:, 0], ne_RM[:, 1])
    assert len(np.unique(auc_RM[:, 0])) == 31
    other = TaskExamples(x.user_N, x.positive_N, USERS, task=1)
    first, second = weights(x, 1, seed=0), weights(other, 1, seed=0)
    np.testing.assert_array_equal(first[~x.positive_N], second[~x.positive_N])
    assert not np.array_equal(first[x.positive_N], second[x.positive_N])


def test_a_resample_without_a_positive_is_undefined() -> None:
    x = TaskExamples(np.arange(USERS), np.arange(USERS) == 7, USERS, 0)
    auc_RM, ne_RM = figures(x, [noise(0, USERS)], resamples=63)
    drawn_L = draw_users(USERS, 0, 0)[7]
    np.testing.assert_array_equal(np.isnan(auc_RM[:, 0]), drawn_L == 0)
    np.testing.assert_array_equal(np.isnan(ne_RM[:, 0]), drawn_L == 0)
    assert np.isfinite(auc_RM[0, 0])


def test_a_score_that_is_not_finite_is_refused() -> None:
    score_N = noise(0)
    score_N[[3, 5]] = np.nan
    with pytest.raises(ValueError, match="model 0: 2 are not finite"):
        figures(examples(0), [score_N], 1)


def test_an_interval_holds_the_truth_about_as_often_as_it_says_for_a_rare_task() -> None:
    """Thirty positives, noise against noise: the expected difference of the two AUCs is 0."""
    held = 0
    for seed in range(80):
        x = examples(100 + seed, num=1_500, rate=0.02)
        auc_RM, _ = figures(x, [noise(1_000 + seed, 1_500), noise(2_000 + seed, 1_500)], 199, seed)
        low, high = np.quantile(auc_RM[1:, 0] - auc_RM[1:, 1], [0.025, 0.975])
        held += low <= 0 <= high
    assert 70 <= held <= 80  # 76 expected; three deviations are 6
