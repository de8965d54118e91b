"""The benchmark of rules for rows: its settings reach the learner, and its figures are those of the examples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks import row_rules
from benchmarks.row_rules import DEFAULT, RATES, ROWS, RuleRun, rule_figures, rule_json, rule_table
from benchmarks.run_cache import RunCache, run_missing

IMPRESSIONS = 4000
COMPARED = {DEFAULT: RATES[DEFAULT], "power -0.25": RATES["power -0.25"]}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(row_rules, "RATES", COMPARED)


def test_figures_are_of_the_examples_after_the_warm_up(tmp_path: Path) -> None:
    cache = RunCache(tmp_path)
    runs = [RuleRun(None, setting, 0, IMPRESSIONS) for setting in COMPARED]
    run_missing(runs, cache, 1)
    figures = rule_figures(None, 1, IMPRESSIONS, cache, resamples=5)
    for setting, run in zip(COMPARED, runs, strict=True):
        result = cache.load(run)
        tasks = [result.facts["tasks"].index(name) for name in figures.tasks]
        arrays = {name: np.asarray(array) for name, array in result.arrays.items()}
        assert IMPRESSIONS * 0.7 < len(arrays["user"]) < IMPRESSIONS * 0.8
        aucs = [
            roc_auc_score(arrays["labels"][:, t][arrays["mask"][:, t]], arrays["scores"][:, t][arrays["mask"][:, t]])
            for t in tasks
        ]
        assert figures.auc.mean(setting) == pytest.approx(np.mean(aucs), abs=1e-6)
    assert figures.auc.mean(DEFAULT) != figures.auc.mean("power -0.25")
    loss = rule_json("drifting_world", figures)["drifting_world_power_minus_0.25_auc_loss"]
    assert loss == pytest.approx(figures.auc.mean(DEFAULT) - figures.auc.mean("power -0.25"))
    assert f"| power -0.25 | {figures.rows['power -0.25']:,} |" in rule_table("drifting world", figures)


def test_each_setting_is_a_run_of_its_own() -> None:
    runs = [RuleRun(Path("log"), setting, 0, 10) for setting in ROWS]
    assert [run.config.rows for run in runs] == list(ROWS.values())
    assert len({run.key for run in runs}) == len(ROWS)
    rates = [RuleRun(None, setting, 0, 10) for setting in COMPARED]
    assert rates[1].config.optimizer.frequency_power == -0.25
    assert rates[0].key != rates[1].key
