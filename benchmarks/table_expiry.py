"""What admission and expiry cost in AUC on a KuaiRand folder: ``smes backtest`` with them and without, same seeds."""

from dataclasses import replace
from pathlib import Path
from statistics import mean

from smes.model.learner import Learner
from smes.model.rows_config import RowRules, RowsConfig
from smes_cli.backtest import run_backtest
from smes_cli.building import build_evaluation
from smes_cli.config import Config
from trainer.evaluation import ProgressiveEvaluation

_WEEK_S = 7 * 86_400.0

RULES = {
    "all": RowsConfig(),
    # A row from the second sighting on, for as long as its id is seen every week; users have theirs at once.
    "expiring": RowsConfig(
        admit_after=2, expire_after_s=_WEEK_S, vocabularies={"user_id": RowRules(expire_after_s=_WEEK_S)}
    ),
    # Users, too. One that has six impressions in all loses the first of them.
    "expiring_users": RowsConfig(admit_after=2, expire_after_s=_WEEK_S),
}


def expiry_loss(log: Path, limit: int | None, seeds: int) -> dict[str, float]:
    """``expiry_auc_loss``: progressive AUC without the rules less AUC with them, the mean over dense tasks and seeds.

    ``expiry_users_auc_loss`` is that of rules which make users wait for their rows, too.
    """
    result: dict[str, float] = {"expiry_seeds": seeds}
    aucs: dict[str, list[float]] = {name: [] for name in RULES}
    for seed in range(seeds):
        for name, rules in RULES.items():
            config = replace(Config(), rows=rules, trainer=replace(Config().trainer, seed=seed))
            auc, rows = _auc(config, log, limit)
            aucs[name].append(auc)
            result[f"rows_{name}"] = rows
            print(f"seed {seed}, {name}: AUC {auc:.5f}, {rows:,} rows at the end", flush=True)
    for name, of_seed in aucs.items():
        result[f"auc_{name}"] = mean(of_seed)
    for key, name in (("expiry_auc_loss", "expiring"), ("expiry_users_auc_loss", "expiring_users")):
        losses = [before - after for before, after in zip(aucs["all"], aucs[name], strict=True)]
        result[key], result[f"{key}_max"] = mean(losses), max(losses)
    return result


def _auc(config: Config, log: Path, limit: int | None) -> tuple[float, int]:
    """The headline's AUC of the dense tasks, and the rows in use at the end."""
    learners: list[Learner] = []

    def evaluate(config: Config, learner: Learner) -> ProgressiveEvaluation:
        learners.append(learner)
        return build_evaluation(config, learner)

    result = run_backtest(config, log, limit=limit, seed=0, baseline=None, should_stop=lambda: False, evaluate=evaluate)
    dense = result.report.headline.dense
    assert dense is not None, "KuaiRand has dense tasks"
    assert dense.auc is not None, "every example was scored"
    return dense.auc, learners[0].num_rows
