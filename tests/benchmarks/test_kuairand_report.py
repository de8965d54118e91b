"""The report on KuaiRand, from figures of which every number is known."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.bootstrap import F64, Paired, PairedGauc
from benchmarks.flops import MeanCost
from benchmarks.kuairand_quality import LogFigures, LogRanker
from benchmarks.kuairand_report import flat_figures, markdown
from benchmarks.kuairand_tasks import TaskSplit
from benchmarks.quality_config import Comparison, RankerEntry, Settings, settings_of

TASKS = TaskSplit(
    names=("click", "long_view", "like", "follow", "hate", "never"),
    examples=(1_000, 1_000, 1_000, 1_000, 900, 1_000),
    positives=(450, 320, 10, 9, 2, 0),
)
NAMES = ("smes", "home", "home_wide", "mmoe")
FLOPS = {"smes": 100.0, "home": 250.0, "home_wide": 400.0, "mmoe": 300.0}
#       click, long_view, like, follow, hate, never
AUC = {
    "smes": [0.72, 0.71, 0.79, 0.70, 0.60, np.nan],
    "home": [0.71, 0.73, 0.75, 0.71, 0.62, np.nan],
    "home_wide": [0.70, 0.72, 0.76, 0.75, 0.63, np.nan],
    "mmoe": [0.73, 0.70, 0.80, 0.60, 0.61, np.nan],
}
COMPARED = Comparison(
    smes="smes",
    paper="paper",
    linear="linear",
    dense=("home", "home_wide", "mmoe"),
    rankers={
        "home": RankerEntry(settings={"model.ranker": "home"}),
        "home_wide": RankerEntry(like="home", settings={"model.home.expert_dims": [128]}),
        "mmoe": RankerEntry(settings={"model.ranker": "mmoe"}),
        **{name: RankerEntry() for name in ("smes", "paper", "linear")},
    },
)


def around(value_ST: F64) -> F64:
    """Resamples in which every ranker's figure is off by the same: all differences stay as they are."""
    off_R = np.linspace(-0.1, 0.1, 21)
    return value_ST + off_R[:, None, None]


@pytest.fixture(scope="module")
def figures() -> LogFigures:
    auc_ST = np.array([AUC[name] for name in NAMES])
    gauc_ST = auc_ST - 0.1
    gauc_ST[:, 4] = np.nan  # no group has both classes of hate
    ne_ST = 1.5 - auc_ST
    rankers = {
        name: LogRanker(
            gauc_KT=np.stack([gauc, gauc + 0.01]),
            auc_KT=np.stack([auc - 0.01, auc + 0.01]),
            cost=MeanCost(FLOPS[name], 0.9 * FLOPS[name], 1_000, 800.0, None),
            impressions_per_s=1_000.0,
        )
        for name, gauc, auc in zip(NAMES, gauc_ST, auc_ST, strict=True)
    }
    gauc = PairedGauc(NAMES, gauc_ST, around(gauc_ST))
    auc, ne = (Paired(NAMES, one, around(one)) for one in (auc_ST, ne_ST))
    return LogFigures(rankers, 1_000, TASKS, gauc, gauc, auc, ne)


def test_base_rates_decide_which_tasks_are_rare() -> None:
    assert TASKS.named(TASKS.dense) == ("click", "long_view", "like")  # 1 % is not below 1 %
    assert TASKS.named(TASKS.rare) == ("follow", "hate")  # one class only is neither
    assert TASKS.base_rates == (0.45, 0.32, 0.01, 0.009, 2 / 900, 0)


def test_each_figure_is_compared_with_the_dense_ranker_that_is_best_in_it(figures: LogFigures) -> None:
    flat = flat_figures(COMPARED, figures)
    expected = {
        "rare_auc_gain": ("rare_best_dense", "home_wide", (0.70 + 0.60 - 0.75 - 0.63) / 2),
        "dense_gauc_gain": ("dense_gauc_best_dense", "mmoe", (0.72 + 0.71 + 0.79 - 0.73 - 0.70 - 0.80) / 3),
        "dense_ne_gain": ("dense_ne_best_dense", "mmoe", (0.72 + 0.71 + 0.79 - 0.73 - 0.70 - 0.80) / 3),
        "rare_ne_gain": ("rare_ne_best_dense", "home_wide", (0.70 + 0.60 - 0.75 - 0.63) / 2),
        "like_auc_gain": ("like_auc_best_dense", "mmoe", -0.01),
        "click_long_view_auc_gain": ("click_long_view_auc_best_dense", "home", (0.72 + 0.71 - 0.71 - 0.73) / 2),
        "hate_auc_gain": ("hate_auc_best_dense", "home_wide", -0.03),
    }
    for key, (rival_key, rival, gain) in expected.items():
        assert flat[rival_key] == rival, key
        for one in (key, f"{key}_ci_low", f"{key}_ci_high"):
            assert flat[one] == pytest.approx(gain), one
    assert "never_auc_gain" not in flat
    assert (flat["dense_tasks"], flat["rare_tasks"]) == ("click,long_view,like", "follow,hate")
    assert (flat["follow_positives"], flat["follow_base_rate"]) == (9, 0.009)


def test_two_rankers_of_one_family_are_kept_apart(figures: LogFigures) -> None:
    flat = flat_figures(COMPARED, figures)
    assert flat["home_rare_auc"] == pytest.approx((0.71 + 0.62) / 2)
    assert flat["home_wide_rare_auc"] == pytest.approx((0.75 + 0.63) / 2)
    assert flat["home_wide_rare_auc_sd"] == pytest.approx(0.01 * np.sqrt(2))
    assert flat["flops_vs_home"] == pytest.approx(100 / 250)
    assert flat["flops_vs_best_home"] == pytest.approx(100 / 400)
    assert flat["best_home"] == "home_wide"
    assert flat["home_rare_auc_vs_rare_best_dense"] == pytest.approx((0.71 + 0.62 - 0.75 - 0.63) / 2)


def test_what_is_undefined_is_null_and_the_rest_is_not_touched_by_it(figures: LogFigures) -> None:
    flat = flat_figures(COMPARED, figures)
    assert flat["smes_rare_gauc"] is None
    assert flat["smes_gauc_hate"] is None
    assert flat["smes_auc_never"] is None
    assert "rare_gauc_gain" not in flat
    assert flat["smes_gauc_follow"] == pytest.approx(0.60)
    assert flat["smes_gauc"] == pytest.approx((0.72 + 0.71 + 0.79) / 3 - 0.1)
    json.dumps(flat, allow_nan=False)


def test_the_tables_name_positives_and_both_headlines(figures: LogFigures) -> None:
    text = markdown(COMPARED, figures)
    assert "rare (base rate under 1 %): follow, hate." in text
    assert "follow (9 positives)" in text
    assert "| `smes` | 0.7000 (-0.0500 [-0.0500, -0.0500]) | 0.6000 (-0.0300 [-0.0300, -0.0300]) |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    assert all(len({row.count("|") for row in table}) == 1 for table in tables)


def test_a_tuned_ranker_runs_with_the_settings_that_its_trials_were_tried_with() -> None:
    """And an ablation with the chosen trial of the ranker that it is an ablation of."""
    trials: tuple[Settings, ...] = ({"optimizer.learning_rate": 0.001},)
    tuned = {
        "home": RankerEntry(settings={"model.ranker": "home"}, trials=({"model.home.encoder_dims": [64]},)),
        "home_wide": RankerEntry(like="home", settings={"model.home.expert_dims": [128]}, trials=trials),
    }
    comparison = replace(COMPARED, rankers={**COMPARED.rankers, **tuned, "ablation": RankerEntry(like="home")})
    chosen: dict[str, Settings] = {"home": {"model.home.encoder_dims": [64]}, "home_wide": trials[0]}
    tried = {**settings_of(comparison, "home_wide", {}), **trials[0]}
    assert settings_of(comparison, "home_wide", chosen) == tried
    assert settings_of(comparison, "ablation", chosen) == {"model.ranker": "home", "model.home.encoder_dims": [64]}
