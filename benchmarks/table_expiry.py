"""What admission and expiry cost in AUC on a KuaiRand folder: ``smes backtest`` with them and without, same seeds."""

from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np

from smes.model.learner import Learner
from smes.model.rows_config import RowsConfig
from smes_cli.backtest import run_backtest
from smes_cli.building import build_evaluation
from smes_cli.config import Config
from trainer.evaluation import ProgressiveEvaluation

EXPIRING = RowsConfig(admit_after=2, expire_after_s=3 * 86_400.0)
"""A row from the second sighting on, for as long as its id is seen every three days. Shared rows cost more: with 64 for
each vocabulary, admission alone lost 0.0023 (seed 0), and without them 0.00005."""


def expiry_loss(log: Path, limit: int | None, seeds: int) -> dict[str, float]:
    """``expiry_auc_loss``: AUC without admission and expiry less AUC with them, the mean over tasks and seeds."""
    result: dict[str, float] = {"expiry_seeds": seeds}
    aucs: dict[str, list[float]] = {"all": [], "expiring": []}
    rows: dict[str, list[int]] = {"all": [], "expiring": []}
    for seed in range(seeds):
        for name, rules in (("all", RowsConfig()), ("expiring", EXPIRING)):
            config = replace(Config(), rows=rules, trainer=replace(Config().trainer, seed=seed))
            auc, used = _auc(config, log, limit)
            aucs[name].append(auc)
            rows[name].append(used)
            print(f"seed {seed}, {name} ids: AUC {auc:.5f}, {used:,} rows at the end", flush=True)
    losses = np.subtract(aucs["all"], aucs["expiring"])
    for name in aucs:
        result[f"auc_{name}"] = mean(aucs[name])
        result[f"rows_{name}"] = mean(rows[name])
    result["expiry_auc_loss"] = float(losses.mean())
    result["expiry_auc_loss_max"] = float(losses.max())
    return result


def _auc(config: Config, log: Path, limit: int | None) -> tuple[float, int]:
    """The mean progressive AUC over the binary tasks that have one, and the rows in use at the end."""
    learners: list[Learner] = []

    def evaluate(config: Config, learner: Learner) -> ProgressiveEvaluation:
        learners.append(learner)
        return build_evaluation(config, learner)

    result = run_backtest(config, log, limit=limit, seed=0, baseline=None, should_stop=lambda: False, evaluate=evaluate)
    aucs = [task.auc for task in result.report.tasks.values() if task.auc is not None]
    return mean(aucs), learners[0].num_rows
