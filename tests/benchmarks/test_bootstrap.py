import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.bootstrap import F64, GroupedAuc, UserTotals, relative_gain, resampled_gauc

T = 2


def examples(seed: int, num: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    user = rng.integers(30, size=num)
    return {
        "group_N": user * 10 + rng.integers(4, size=num),
        "user_N": user,
        "scores_NT": rng.random((num, T)).round(1).astype(np.float32),  # rounded: ties
        "labels_NT": (rng.random((num, T)) < 0.4).astype(np.float32),
        "mask_NT": rng.random((num, T)) < 0.8,
    }


def naive_gauc(x: dict[str, np.ndarray], users: list[int], t: int) -> float:
    """Group by group, for every time that its user was drawn."""
    weighted, weight = 0.0, 0.0
    for user in users:
        for group in np.unique(x["group_N"][x["user_N"] == user]):
            rows = (x["group_N"] == group) & x["mask_NT"][:, t]
            labels = x["labels_NT"][rows, t]
            if 0 < labels.sum() < len(labels):
                weighted += len(labels) * roc_auc_score(labels, x["scores_NT"][rows, t])
                weight += len(labels)
    return weighted / weight


def test_gauc_is_that_of_a_loop_over_groups() -> None:
    x = examples(0)
    gauc_T = GroupedAuc.of(**x).by_user().gauc_T
    for t in range(T):
        assert gauc_T[t] == pytest.approx(naive_gauc(x, list(np.unique(x["user_N"])), t))


def test_resamples_are_those_of_a_loop_over_drawn_users() -> None:
    x, y = examples(1), examples(2)
    y["user_N"], y["group_N"] = x["user_N"], x["group_N"] + 1_000  # other groups of the same users
    resamples = 70  # more than one matrix product
    got = resampled_gauc([GroupedAuc.of(**x).by_user(), GroupedAuc.of(**y).by_user()], resamples, seed=5)
    users = np.unique(x["user_N"])
    rng = np.random.default_rng(5)
    for r in range(resamples):
        drawn = [int(users[i]) for i in rng.integers(len(users), size=len(users))]
        if r % 23 == 0:
            expected = [[naive_gauc(one, drawn, t) for t in range(T)] for one in (x, y)]
            np.testing.assert_allclose(got[r], expected)


def test_a_user_of_one_ranker_only_counts_as_nothing_for_the_other() -> None:
    x = examples(3)
    some = x["user_N"] < 20
    fewer = GroupedAuc.of(**{name: column[some] for name, column in x.items()}).by_user()
    both = resampled_gauc([GroupedAuc.of(**x).by_user(), fewer], 20)
    assert both.shape == (20, 2, T)
    assert np.isfinite(both).all()


def test_totals_over_parts_are_those_of_the_whole() -> None:
    x = examples(4)
    late = x["group_N"] % 2 == 0  # whole groups
    parts = [GroupedAuc.of(**{n: c[rows] for n, c in x.items()}) for rows in (late, ~late)]
    np.testing.assert_allclose(UserTotals.of(parts).gauc_T, GroupedAuc.of(**x).by_user().gauc_T)


def test_the_mean_over_seeds_is_the_mean_of_their_gaucs() -> None:
    x, y = examples(6), examples(6)
    y["scores_NT"] = examples(7)["scores_NT"]
    each = [GroupedAuc.of(**one) for one in (x, y)]
    expected: F64 = np.mean([one.by_user().gauc_T for one in each], axis=0)
    np.testing.assert_allclose(GroupedAuc.mean(each).by_user().gauc_T, expected)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Coverage over many data sets whose true difference is known: the expected AUC of noise against noise is 1/2."""
    held = 0
    for seed in range(60):
        x, y = examples(100 + seed), examples(100 + seed)
        y["scores_NT"] = examples(1_000 + seed)["scores_NT"]
        totals = [GroupedAuc.of(**one).by_user() for one in (x, y)]
        resampled = resampled_gauc(totals, 300, seed).mean(axis=2)
        ours, theirs = (float(one.gauc_T.mean()) for one in totals)
        interval = relative_gain(ours, theirs, resampled[:, 0], resampled[:, 1])
        assert interval.low <= interval.value <= interval.high
        held += interval.low <= 0 <= interval.high
    assert 51 <= held <= 60  # 57 expected; both bounds are 3 deviations and more away
